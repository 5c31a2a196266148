"""What a wrong result looks like, and what is likely the matter: read off how the error runs on after the boundary.

Where the error stands tells more than how large it is. A state that forgets, dropped once, shows and fades. A position that
restarts stays wrong. A convolution's tail is missed for as many tokens as it is long. A window evicts a key too many,
and nothing is seen of it until the window is full.
"""

from __future__ import annotations

from itertools import accumulate

from pytest_lmeval.laws._tolerance import Excess

FADED, GROWN = 1 / 30, 30.0
SMALL = 0.02  # nats: below it, what is wrong is a rounding or a constant, not a state that is missing


def likely_fault(sizes: list[int], excess: Excess) -> str:
    """One or two sentences: at which boundary it goes wrong, how it goes on, and the likely kind of fault.

    sizes  the pieces in which the sequence was read
    """
    profile = excess.profile.tolist()
    wrong = [place for place, share in enumerate(profile) if share > 1]
    if not wrong:
        return "Every token is off by a little: rounding of another kind in chunks than in one piece."
    ends = list(accumulate(sizes))
    first = wrong[0]
    piece = next(number for number, end in enumerate(ends) if first < end)
    begin, end = ends[piece] - sizes[piece], ends[piece]
    if piece == 0:
        return (
            f"It is wrong in the first piece already, where nothing is carried yet: what a token gets depends on how long "
            f"the call is ({sizes[0]} against {ends[-1]} and more tokens). Another code path for short calls, a padding "
            "of the piece to a block, or logits that look at the whole of a call."
        )
    where = f"It goes wrong at the boundary after token {begin - 1}"
    if first - begin >= 2 and sizes[piece] > 1:
        where = f"It goes wrong {first - begin} tokens after the boundary before token {begin}"
    elif sizes[: piece + 1].count(1) == piece + 1 and piece > 1:
        where = f"Read one token at a time, it goes wrong at token {first}"
    later = [place for place in wrong if place >= end]
    if sizes[piece] == 1 and any(size > 1 for size in sizes[1:piece]):
        where = f"Longer pieces go well, and that of one token after {begin} does not: single tokens take another code path. It"
        where += " goes wrong there"
    elif all(size == 1 for number, size in enumerate(sizes) if _any_wrong(profile, ends, number)) and max(sizes) > 1:
        return f"{where}, and only in pieces of one token: single tokens take another code path than longer calls do."
    kind = _course(profile, first, wrong[-1], later)
    small = (
        f" It is small ({excess.error:.2g} nats): rather a state kept in fewer bits, or a constant that differs between two "
        "code paths, than something that is missing."
        if excess.error < SMALL
        else ""
    )
    return f"{where}, {kind}{small}"


def _course(profile: list[float], first: int, last: int, later: list[int]) -> str:
    stretch = last - first + 1
    rest = profile[first:]
    top = max(rest)
    tail = max(rest[-max(1, len(rest) // 8) :])
    if len(rest) < 3:
        return "where the sequence ends: something that was read before is not carried over, or not counted."
    if stretch <= 4 and not later and len(rest) >= 2 * stretch + 2:
        return (
            f"and is right again {stretch} token(s) later: a convolution's tail, or the last keys before the boundary, are "
            "dropped or shifted."
        )
    if tail <= FADED * top:
        return "and fades out: a state that forgets (recurrent, gated, windowed) was dropped, replaced or rounded there."
    if tail >= GROWN * max(rest[0], 1.0) and profile.index(top) > first + len(rest) // 2:
        return "and grows with the text: an error that adds up, as in a state that is rounded, or a count that runs off."
    return (
        "and stays wrong: positions that restart or are off by some, a mask that hides or shows too much, or a state that was "
        "lost or overwritten."
    )


def _any_wrong(profile: list[float], ends: list[int], number: int) -> bool:
    begin = ends[number - 1] if number else 0
    return any(share > 1 for share in profile[begin : ends[number]])
