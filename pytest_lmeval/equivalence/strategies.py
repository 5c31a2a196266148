"""What a law is tried on: small structured choices that shrink well, never tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import strategies as st


@dataclass(frozen=True)
class Case:
    """A sequence of `length` random tokens (from `seed`) and the places where it is cut."""

    length: int
    cuts: tuple[int, ...] = ()
    seed: int = 0

    @property
    def sizes(self) -> list[int]:
        """The lengths of the pieces.

        >>> Case(10, (3, 4)).sizes
        [3, 1, 6]
        """
        places = [0, *self.cuts, self.length]
        return [after - before for before, after in pairwise(places)]

    def __str__(self) -> str:
        return f"{self.length} tokens (seed {self.seed}) in pieces of {self.sizes}"


def cases(longest: int, borders: tuple[int, ...] = ()) -> st.SearchStrategy[Case]:
    """Sequences of 2 to `longest` tokens, cut anywhere, and often where an inner working changes."""

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        length = draw(st.integers(2, longest))
        special = sorted(
            {place for border in (1, *borders) for place in (border - 1, border, border + 1) if 0 < place < length}
        )
        place = st.integers(1, length - 1)
        if special:
            place = st.sampled_from(special) | place
        cuts = draw(st.lists(place, min_size=1, max_size=6, unique=True))
        return Case(length, tuple(sorted(cuts)), draw(st.integers(0, 3)))

    return draw_case()


def edge_cases(longest: int, borders: tuple[int, ...] = ()) -> list[Case]:
    """The cases that faults have been found on, small ones first: two pieces, the first or last token alone, equal
    pieces, each border and its neighbours."""
    short = min(longest, 8)
    found = [Case(short, (short // 2,)), Case(short, (1,))]
    pieces = min(longest, 100)
    found += [Case(longest, (longest - 1,)), Case(pieces, tuple(range(5, pieces, 5)))]
    for border in (*borders, 64):
        found += [Case(longest, (cut,)) for cut in (border - 1, border, border + 1) if 0 < cut < longest]
    return found


def aligned_cases(multiple: int, longest: int) -> list[Case]:
    """Sequences cut at multiples of a length only, with a rest of any length at the end; short ones first."""
    k, long = multiple, min(longest, 12 * multiple + 100)
    lengths = [length for length in (2 * k, 2 * k + 1, 3 * k - 1, 4 * k + k // 2, 6 * k + 1, long) if 2 <= length <= longest]
    everywhere = [Case(length, tuple(range(k, length, k)), seed) for seed, length in enumerate(lengths) if length > k]
    once = [Case(long, (place,)) for place in sorted({long * part // 8 // k * k for part in range(1, 8)}) if 0 < place < long]
    return everywhere + once
