"""What a law is tried on: small structured choices that shrink well, never tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from hypothesis import strategies as st

POWERS = (8, 16, 32, 64, 128)
SHORT = 40  # tokens of every second sequence: cheap, and most faults need no more
SEEDS = 3  # kinds of token sequences, see `Harness.tokens`


@dataclass(frozen=True)
class Case:
    """A sequence of `length` random tokens (from `seed`), the places where it is cut, and its company. A law looks at
    what concerns it (`laws._checks.Law.uses`).

    rows     sequences in the batch; this one is number `row` of them
    padding  how many tokens longer its neighbours are: so many are appended to it, and their logits are not looked at
    before   tokens of another sequence that is read first
    """

    length: int
    cuts: tuple[int, ...] = ()
    seed: int = 0
    rows: int = 1
    row: int = 0
    padding: int = 0
    before: int = 0

    @property
    def sizes(self) -> list[int]:
        """The lengths of the pieces.

        >>> Case(10, (3, 4)).sizes
        [3, 1, 6]
        """
        places = [0, *self.cuts, self.length]
        return [after - before for before, after in pairwise(places)]

    def choices(self) -> dict[str, Any]:
        """What differs from the simplest case, for a replay and for a file.

        >>> Case(10, (3, 4), seed=1).choices()
        {'length': 10, 'cuts': (3, 4), 'seed': 1}
        """
        simplest = vars(Case(self.length))
        return {"length": self.length} | {name: value for name, value in vars(self).items() if value != simplest[name]}

    def __str__(self) -> str:
        pieces = f" in pieces of {_short(self.sizes)}" if self.cuts else ""
        beside = f", row {self.row} of {self.rows}" if self.rows > 1 else ""
        padded = f", {self.padding} tokens of padding after it" if self.padding else ""
        before = f", after {self.before} tokens of another sequence" if self.before else ""
        return f"{self.length} tokens (seed {self.seed}){pieces}{beside}{padded}{before}"


def pieces(length: int, *sizes: int) -> tuple[int, ...]:
    """The cuts of a sequence into pieces of these sizes, the last size repeated to the end.

    >>> pieces(10, 4, 1, 2)
    (4, 5, 7, 9)
    """
    filled = [*sizes, *[sizes[-1]] * (length // sizes[-1])]
    return tuple(place for place in accumulate(filled) if place < length)


def compositions(length: int, boundaries: tuple[int, ...] = ()) -> st.SearchStrategy[tuple[int, ...]]:
    """Ways to cut `length` tokens: few cuts, often at the boundaries, or pieces of a few sizes that repeat, often of one token.

    Shrinks to a single cut after the first token.
    """
    near = {boundary + off for boundary in (1, *boundaries, *POWERS) for off in (-1, 0, 1)}
    special = sorted(size for size in near if 0 < size < length) or [1]
    size = st.integers(1, length - 1) if length > 1 else st.just(1)
    cuts = st.lists(size | st.sampled_from(special), min_size=1, max_size=5, unique=True).map(lambda c: tuple(sorted(c)))
    sizes = st.lists(st.just(1) | st.sampled_from(special) | size, min_size=2, max_size=5)
    return cuts | sizes.map(lambda some: pieces(length, *some) or (1,))


def cases(longest: int, boundaries: tuple[int, ...] = ()) -> st.SearchStrategy[Case]:
    """Sequences of 2 to `longest` tokens, cut anywhere, and often where an inner working changes; company of every kind."""

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        length = draw(st.integers(2, min(longest, SHORT)) | st.integers(2, longest))
        cuts = draw(compositions(length, boundaries))
        seed = draw(st.integers(0, SEEDS - 1))
        rows = draw(st.integers(2, 4))
        row = draw(st.integers(0, rows - 1))
        return Case(length, cuts, seed, rows, row, draw(st.integers(0, 9)), draw(st.integers(1, longest)))

    return draw_case()


def edge_cases(longest: int, boundaries: tuple[int, ...] = ()) -> list[Case]:
    """The cases that faults have been found on, those first that must never be left out: three pieces, a long sequence in
    small pieces of many sizes, then the first or last token alone, single tokens after a long piece, each boundary and its
    neighbours."""
    short, middle = min(longest, 8), min(longest, 72)
    found = [
        Case(short, pieces(short, 3, 1, 4), rows=2, padding=3, before=short),
        Case(longest, pieces(longest, 1, 2, 7, 3, 13, 1, longest // 3 + 1, 4, 6, 1, longest), rows=3, row=1, before=3),
        Case(middle, pieces(middle, middle - min(8, middle // 2), 1), rows=2, row=1, before=middle),
        Case(short, (1,), 2, rows=2, row=1, before=1),
        Case(longest, (longest - 1,), 1, rows=9, row=8, padding=1, before=longest),
        Case(longest, pieces(longest, 5), rows=3, row=2, padding=6, before=2),
        Case(middle, pieces(middle, 3, 2), 2, rows=3, before=5),
    ]
    for place, boundary in enumerate((*boundaries, 64)):
        for cut in (boundary - 1, boundary, boundary + 1):
            if 0 < cut < longest:
                found += [Case(longest, (cut,), place % SEEDS, rows=2, row=place % 2, padding=cut % 4, before=cut)]
                found += [Case(longest, pieces(longest, cut), place % SEEDS, rows=2, padding=cut % 3, before=cut)]
    return [case for case in found if case.cuts]


ESSENTIAL = 3  # so many of the first edge cases are tried whatever they cost


def shortest_case(longest: int) -> Case:
    """What a model is tried on for which a call is dear."""
    length = min(longest, 5)
    return Case(length, pieces(length, 2, 2, 1) or (1,), rows=2, padding=1, before=2)


def aligned_cases(multiple: int, longest: int, boundaries: tuple[int, ...] = ()) -> list[Case]:
    """Sequences cut at multiples of a length only, with a rest of any length at the end, many of one token."""
    k, long = multiple, longest
    rests = [2 * k, 3 * k - 1, 4 * k + k // 2, long]
    singles = [times * k + 1 for times in range(1, 13) if times * k < longest]
    seeds = range(max(SEEDS, 24 // max(1, len(singles))))
    everywhere = [Case(length, pieces(length, k), seed) for length in rests if k < length <= longest for seed in range(SEEDS)]
    everywhere += [Case(length, pieces(length, k), seed) for length in singles for seed in seeds]
    places = {long * part // 8 // k * k for part in range(1, 8)} | {
        boundary // k * k + off for boundary in boundaries for off in (0, k)
    }
    once = [Case(long, (place,)) for place in sorted(places | {(long - 1) // k * k}) if 0 < place < long]
    return everywhere + once


def _short(sizes: list[int]) -> str:
    """A list that fits a line, repeats counted.

    >>> _short([3, *[1] * 20, 2])
    '[3, 20 x 1, 2]'
    """
    runs: list[tuple[int, int]] = []
    for size in sizes:
        runs = [*runs[:-1], (runs[-1][0] + 1, size)] if runs and runs[-1][1] == size else [*runs, (1, size)]
    parts = [part for n, size in runs for part in ([f"{n} x {size}"] if n > 3 else [str(size)] * n)]
    return f"[{', '.join(parts if len(parts) < 13 else [*parts[:10], '...', parts[-1]])}]"
