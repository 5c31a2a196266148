"""How two runs are held to each other, and what is raised where a law is broken."""

from __future__ import annotations

import functools
import math

from torch import Tensor

from pytest_lmeval.errors import LawBroken
from pytest_lmeval.laws._diagnosis import likely_fault
from pytest_lmeval.laws._harness import Harness
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.laws._tolerance import Excess, log_probabilities


@functools.cache
def _class_of(decade: int) -> type[LawBroken]:
    return type(f"LawBrokenBy1e{decade}", (LawBroken,), {"__module__": __name__})


def broken(case: Case, message: str, *, share: float = math.inf, error: float = math.inf, likely: str = "") -> LawBroken:
    """The exception for a law that this case breaks."""
    plain = LawBroken(message)
    plain.share = share
    found = _class_of(plain.decade)(message)
    found.case, found.share, found.error, found.likely = case, share, error, likely
    return found


def same(one: Tensor, other: Tensor) -> bool:
    """Bit-equal, where a place that is no number in both is equal too."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def bit_equal(harness: Harness, case: Case, one: Tensor, other: Tensor, what: str, why: str, *, after: int = 0) -> None:
    if harness.lm.device.type != "cpu":  # atomic additions and chosen kernels may round otherwise from call to call there
        near(harness, case, one, other, what, why, after=after)
    elif not same(one, other):
        first, error = first_difference(one, other)
        raise broken(case, f"{case}, {what}: off by {error:.3g} at token {after + first}. {why}", error=error)


def near(harness: Harness, case: Case, one: Tensor, other: Tensor, what: str, why: str, *, after: int = 0) -> None:
    """As near as rounding brings two runs of the same shape, the one perhaps with weights that lie elsewhere in memory."""
    excess = harness.yardstick(case.seed, case.length).against(log_probabilities(one)).measure(log_probabilities(other))
    within(case, excess, f"{case}, {what}: off by {excess.error:.3g} nats at token {after + excess.position}. {why}")


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two runs' logits; infinite where one of them alone is no finite number."""
    equal = (one == other) | (one.isnan() & other.isnan())
    error = (one.double() - other.double()).abs().masked_fill(equal, 0.0)
    return float(error.nan_to_num(nan=math.inf).max())


def first_difference(one: Tensor, other: Tensor) -> tuple[int, float]:
    different = (one != other) & ~(one.isnan() & other.isnan())
    return int(different.nonzero()[0, 0]), largest_difference(one, other)


def within(case: Case, excess: Excess, message: str, *, sizes: list[int] | None = None) -> None:
    """Raise LawBroken with this message where more than the allowance was taken; with `sizes`, the pieces that were read, say
    what it looks like too."""
    if not excess.share <= 1:
        likely = likely_fault(sizes, excess) if sizes else ""
        raise broken(case, message, share=excess.share, error=excess.error, likely=likely)
