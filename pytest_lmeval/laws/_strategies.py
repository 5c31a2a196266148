"""Draw the cases that a law is tried on: small structured choices that shrink well, never tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

from hypothesis import strategies as st

MANY = 8  # chunks of a length before it counts as exact in multiples
POWERS = (8, 16, 32, 64, 128)
SHORT = 40  # tokens of every second sequence: cheap, and enough for most faults
MOST_ROWS = 33
SEEDS = 3  # kinds of token sequences, see `Harness.tokens`


@dataclass(frozen=True)
class Case:
    """A sequence of `length` random tokens (from `seed`), the positions at which it is cut into chunks, and its company.

    rows     sequences in the batch, each of other tokens
    padding  the most tokens that a row is shorter than the batch; their logits are ignored
    before   tokens of another sequence that is read first
    """

    length: int
    cuts: tuple[int, ...] = ()
    seed: int = 0
    rows: int = 1
    padding: int = 0
    before: int = 0

    @property
    def sizes(self) -> list[int]:
        """The lengths of the chunks.

        >>> Case(10, (3, 4)).sizes
        [3, 1, 6]
        """
        return [after - before for before, after in pairwise([0, *self.cuts, self.length])]

    def choices(self) -> dict[str, Any]:
        """The fields that differ from the simplest case, for a replay and for a file.

        >>> Case(10, (3, 4), seed=1).choices()
        {'length': 10, 'cuts': (3, 4), 'seed': 1}
        """
        simplest = vars(Case(self.length))
        return {"length": self.length} | {name: value for name, value in vars(self).items() if value != simplest[name]}

    def __str__(self) -> str:
        chunks = f" in chunks of {_short(self.sizes)}" if self.cuts else ""
        beside = f", {self.rows} rows" if self.rows > 1 else ""
        padded = f", padded by up to {self.padding} tokens" if self.padding else ""
        before = f", after {self.before} tokens of another sequence" if self.before else ""
        return f"{self.length} tokens (seed {self.seed}){chunks}{beside}{padded}{before}"


def chunk_cuts(length: int, *sizes: int) -> tuple[int, ...]:
    """The cuts of a sequence into chunks of these sizes, the last size repeated to the end.

    >>> chunk_cuts(10, 4, 1, 2)
    (4, 5, 7, 9)
    """
    filled = [*sizes, *[sizes[-1]] * (length // sizes[-1])]
    return tuple(cut for cut in accumulate(filled) if cut < length)


def compositions(length: int, boundaries: tuple[int, ...] = ()) -> st.SearchStrategy[tuple[int, ...]]:
    """Ways to cut `length` tokens: few cuts, often at the boundaries, or chunks of a few sizes that repeat, often of one token.

    Shrinks to a single cut after the first token.
    """
    near = {boundary + off for boundary in (1, *boundaries, *POWERS) for off in (-1, 0, 1)}
    special = sorted(size for size in near if 0 < size < length) or [1]
    size = st.integers(1, length - 1) if length > 1 else st.just(1)
    cuts = st.lists(size | st.sampled_from(special), min_size=1, max_size=5, unique=True).map(lambda c: tuple(sorted(c)))
    sizes = st.lists(st.just(1) | st.sampled_from(special) | size, min_size=2, max_size=5)
    return cuts | sizes.map(lambda some: chunk_cuts(length, *some) or (1,))


@st.composite
def cases(draw: st.DrawFn, longest: int, boundaries: tuple[int, ...] = ()) -> Case:
    """Sequences of 2 to `longest` tokens, cut anywhere and often near `boundaries`, in company of every kind."""
    length = draw(st.integers(2, min(longest, SHORT)) | st.integers(2, longest))
    cuts = draw(compositions(length, boundaries))
    seed = draw(st.integers(0, SEEDS - 1))
    rows = draw(st.integers(2, 4) | st.integers(2, MOST_ROWS))
    return Case(length, cuts, seed, rows, draw(st.integers(0, 9)), draw(st.integers(1, longest)))


def edge_cases(longest: int, boundaries: tuple[int, ...] = ()) -> list[Case]:
    """The cases on which faults are found: three chunks, small chunks of many sizes, single tokens after a long chunk, the
    first or last token alone, each boundary and its neighbours."""
    short, middle = min(longest, 8), min(longest, 72)
    found = [
        Case(short, chunk_cuts(short, 3, 1, 4), rows=2, padding=3, before=short),
        Case(longest, chunk_cuts(longest, 1, 2, 7, 3, 13, 1, longest // 3 + 1, 4, 6, 1, longest), rows=3, before=3),
        Case(middle, chunk_cuts(middle, middle - min(8, middle // 2), 1), rows=2, before=middle),
        Case(short, (1,), 2, rows=2, before=1),
        Case(longest, (longest - 1,), 1, rows=9, padding=1, before=longest),
        Case(longest, chunk_cuts(longest, 5), rows=3, padding=6, before=2),
        Case(middle, chunk_cuts(middle, 3, 2), 2, rows=3, before=5),
    ]
    for index, boundary in enumerate((*boundaries, 64)):
        seed = index % SEEDS
        for cut in (boundary - 1, boundary, boundary + 1):
            if 0 < cut < longest:
                found += [Case(longest, (cut,), seed, rows=2, padding=cut % 4, before=cut)]
                found += [Case(longest, chunk_cuts(longest, cut), seed, rows=2, padding=cut % 3, before=cut)]
    return [case for case in found if case.cuts]


def every_chunk_length(longest: int) -> list[Case]:
    """Sequences whose chunks after the first have every length from 1 to half of the longest, once."""
    found, sizes, used = list[Case](), list[int](), 0
    lengths = range(1, longest // 2 + 1)
    for size in sorted(lengths, key=lambda size: size * 79 % len(lengths)):  # long ones among short ones
        if used + size >= longest:
            found.append(Case(longest, chunk_cuts(longest, 1, *sizes, longest), len(found) % SEEDS))
            sizes, used = [], 0
        sizes.append(size)
        used += size
    return [*found, Case(longest, chunk_cuts(longest, 1, *sizes, longest))] if sizes else found


def aligned_cases(k: int, longest: int, boundaries: tuple[int, ...] = ()) -> list[Case]:
    """Sequences cut only at multiples of `k`: into many chunks of `k`, with rests of many lengths, often of one token."""
    rests = [MANY * k + rest for rest in (1, k // 2, k - 1)] + [3 * k - 1, longest]
    singles = [times * k + 1 for times in range(1, 13) if times * k < longest]
    seeds = range(max(SEEDS, 24 // max(1, len(singles))))
    found = [Case(length, chunk_cuts(length, k), seed) for length in rests if k < length <= longest for seed in range(SEEDS)]
    found += [Case(length, chunk_cuts(length, k), seed) for length in singles for seed in seeds]
    cuts = {longest * part // 8 // k * k for part in range(1, 8)} | {(longest - 1) // k * k}
    cuts |= {boundary // k * k + off for boundary in boundaries for off in (0, k)}
    found += [Case(longest, (cut,)) for cut in sorted(cuts) if 0 < cut < longest]  # long rests
    return list(dict.fromkeys(found))


def _short(sizes: list[int]) -> str:
    """A list that fits a line, repeats counted.

    >>> _short([3, *[1] * 20, 2])
    '[3, 20 x 1, 2]'
    """
    runs = [(size, len(list(run))) for size, run in groupby(sizes)]
    parts = [part for size, n in runs for part in ([f"{n} x {size}"] if n > 3 else [str(size)] * n)]
    return f"[{', '.join(parts if len(parts) < 13 else [*parts[:10], '...', parts[-1]])}]"
