"""Raise `LawBroken`, and name the likely fault from how the error goes on after a boundary."""

from __future__ import annotations

import math
from itertools import accumulate

from pytest_lmeval.errors import LawBroken
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.laws._tolerance import Excess

BY_DECADE: list[type[LawBroken]] = [type(f"LawBrokenBy1e{decade}", (LawBroken,), {}) for decade in range(10)]
FADED, GROWN = 1 / 30, 30.0
SMALL = 0.02  # nats: a smaller error is a rounding or a constant, not a missing state


def broken(
    case: Case, message: str, *, tolerance_ratio: float = math.inf, error: float = math.inf, likely: str = ""
) -> LawBroken:
    failure = LawBroken(message)
    failure.case, failure.tolerance_ratio, failure.error, failure.likely = case, tolerance_ratio, error, likely
    failure.__class__ = BY_DECADE[failure.decade]
    return failure


def assert_tolerated(case: Case, excess: Excess, message: str, *, sizes: list[int] | None = None) -> None:
    """Raise LawBroken with this message if the error exceeds the tolerance; with `sizes`, those of the chunks, diagnose it."""
    if not excess.tolerance_ratio <= 1:
        likely = likely_fault(sizes, excess) if sizes else ""
        raise broken(case, message, tolerance_ratio=excess.tolerance_ratio, error=excess.error, likely=likely)


def likely_fault(sizes: list[int], excess: Excess) -> str:
    """One or two sentences: the boundary at which it goes wrong, how the error goes on, and the likely fault."""
    profile = excess.profile.tolist()
    wrong = [position for position, ratio in enumerate(profile) if ratio > 1]
    if not wrong:
        return "Every token is off by a little: chunks are rounded otherwise than one call."
    ends = list(accumulate(sizes))
    first = wrong[0]
    chunk = next(index for index, end in enumerate(ends) if first < end)
    begin, end = ends[chunk] - sizes[chunk], ends[chunk]
    if chunk == 0:
        return (
            f"It is wrong in the first chunk already, where nothing is carried yet: logits depend on the length of the call "
            f"({sizes[0]} against {ends[-1]} and more tokens). Another code path for short calls, padding to a block, or "
            "logits that look at the whole call."
        )
    where = f"It goes wrong at the boundary after token {begin - 1}"
    if first - begin >= 2 and sizes[chunk] > 1:
        where = f"It goes wrong {first - begin} tokens after the boundary before token {begin}"
    elif chunk > 1 and all(size == 1 for size in sizes[: chunk + 1]):
        where = f"Read one token at a time, it goes wrong at token {first}"
    wrong_chunks = {size for size, end in zip(sizes, ends, strict=True) if any(end - size <= t < end for t in wrong)}
    if sizes[chunk] == 1 and any(size > 1 for size in sizes[1:chunk]):
        where = (
            f"Longer chunks are right, and the one of one token after {begin} is wrong: single tokens take another code path. "
            "It goes wrong there"
        )
    elif wrong_chunks == {1} and max(sizes) > 1:
        return f"{where}, and only in chunks of one token: single tokens take another code path than longer calls do."
    likely = f"{where}, {_course(profile[first:], wrong[-1] - first + 1, wrong[-1] >= end)}"
    if excess.error < SMALL:
        likely += (
            f" It is small ({excess.error:.2g} nats): rather a state kept in fewer bits, or a constant that differs between "
            "two code paths, than something that is missing."
        )
    return likely


def _course(rest: list[float], stretch: int, later: bool) -> str:
    """Describe an error: `rest` from the first wrong token, `stretch` tokens to the last, in a `later` chunk or not."""
    top = max(rest)
    tail = max(rest[-max(1, len(rest) // 8) :])
    if len(rest) < 3:
        return "where the sequence ends: something read before is not carried over, or not counted."
    if stretch <= 4 and not later and len(rest) >= 2 * stretch + 2:
        return (
            f"and is right again {stretch} token(s) later: a convolution's tail, or the last keys before the boundary, are "
            "dropped or shifted."
        )
    if tail <= FADED * top:
        return "and fades out: a state that forgets (recurrent, gated, windowed) was dropped, replaced or rounded there."
    if tail >= GROWN * max(rest[0], 1.0) and rest.index(top) > len(rest) // 2:
        return "and grows with the text: an error that adds up, as in a rounded state, or a count that runs off."
    return "and stays wrong: positions that are off, a mask that hides or shows too much, or a state lost or overwritten."


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"
