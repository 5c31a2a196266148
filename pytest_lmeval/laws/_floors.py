"""List the cases on which each law has to be tried before it counts as kept, whatever a call costs.

All are cut from one sequence of L tokens, whose full run and reference they share (see `floor_length`).
"""

from __future__ import annotations

from random import Random

from pytest_lmeval.laws._strategies import Case, chunk_cuts

SHORTEST_FLOOR = 320  # tokens
CONTINUED = 24  # tokens before the early fork, stop, and batch
TREE = 20  # tokens of the sequences of a tree
TURNS = 3  # tokens that a fork or a resumed state reads
SINGLES, LAST_SINGLES = 8, 16  # tokens read one by one, at the beginning and at the end
PIECES = (23, 64, 100)  # chunk lengths of whole readings: odd, a power of two, neither
BATCHES = (2, 8, 33)  # rows
EARLY_CUT = 30


def floor_length(boundaries: tuple[int, ...], context: int | None) -> int:
    """Tokens of the sequence: at least 320, past the largest boundary (window, block) twice, and within the context.

    >>> floor_length((), None), floor_length((256,), None), floor_length((256,), 100)
    (320, 513, 100)
    """
    length = max(SHORTEST_FLOOR, 2 * max(boundaries, default=0) + 1)
    return length if context is None else min(length, context)


def floors(length: int, drawn: Random) -> dict[str, tuple[Case, ...]]:
    """The floor of each law for a sequence of `length` tokens, at least 2; one composition is `drawn`."""
    half, early, rest = length // 2, min(CONTINUED, length // 2), min(TURNS, length - length // 2)
    pieces = [(half,), (min(EARLY_CUT, length - 1),), *(chunk_cuts(length, min(size, length - 1)) for size in PIECES)]
    batch, before = min(CONTINUED, length), min(9, length)
    return {
        "repeat": (Case(length),),
        "isolation": (Case(early + rest, (early,), rows=2, before=before), Case(max(2, half), rows=2, before=before)),
        "causality": (Case(length, (half,)), *([Case(length, (half, half + max(1, half // 2)))] if length > 3 else [])),
        "prefix": tuple(Case(length, (cut,)) for cut in sorted({1, min(23, length - 1), half})),
        "splits": (*(Case(length, cuts) for cuts in dict.fromkeys(pieces)), Case(length, drawn_cuts(length, drawn))),
        "steps": (Case(min(SINGLES, length)), Case(length, (max(1, length - LAST_SINGLES),))),
        "fork": tuple(Case(cut + rest, (cut,)) for cut in sorted({early, half})),
        "resume": tuple(Case(cut + rest, (cut,)) for cut in sorted({early, half})),
        "rows": tuple(Case(batch, _batch_cuts(batch), rows=rows, padding=batch - 1) for rows in BATCHES),
        "size": (Case(length),),
        "sums": (Case(min(length, 13), (min(8, length // 2),)),),
        "packed": (Case(min(TREE, length)), Case(half + min(TREE, length - half), (half,))),
    }


def drawn_cuts(length: int, drawn: Random) -> tuple[int, ...]:
    """One cut anywhere, so that the chunk after it has any length."""
    return (drawn.randrange(1, length),)


def _batch_cuts(length: int) -> tuple[int, ...]:
    """A first chunk, one that continues it, and a single token."""
    return tuple(sorted({max(1, length * 14 // 24), max(1, length - 1)}))
