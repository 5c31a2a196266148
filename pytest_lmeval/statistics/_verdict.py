"""Judge whether a number is worse than before, from its difference, interval and margin.

identical   no example changed
worse       the loss exceeds the margin, and p, adjusted by Holm, is at most the level (1 %)
better      the same in the other direction
same        the 95 % interval excludes a loss beyond the margin (non-inferiority)
unclear     none of these: there are too few examples
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_lmeval.statistics._paired import Difference, detectable, examples_needed, holm

LEVEL = 0.01

Name = Literal["worse", "unclear", "better", "same", "identical"]


@dataclass(frozen=True)
class Verdict:
    """p           probability of so large a difference in its direction, had nothing changed, before Holm
    level       what p must not exceed to count: the level over the number of metrics left in Holm's order
    detectable  the true loss that would be called worse with a probability of 80 %; None if none would
    needed      number of examples that would call no loss the same with that probability; None if unknown
    fewest      number of independent units below which even a total loss is not called worse; None if there are enough
    """

    name: Name
    p: float
    level: float
    detectable: float | None
    needed: int | None
    fewest: int | None = None


def judge_all(
    differences: Sequence[Difference],
    margins: Sequence[float],
    better: Sequence[bool],
    *,
    family: int | None = None,
    level: float = LEVEL,
    two_sided: bool = False,
) -> list[Verdict]:
    """The verdicts of metrics that are judged together.

    margins    what each may lose, 0 or more, in its own unit
    better     whether higher is better
    family     number of metrics gated in the whole run, where these are some of them (see `statistics._paired.holm`)
    level      probability of any `worse`, or of any `better`, where nothing changed
    two_sided  whether `same` also excludes a gain beyond the margin (equivalence)

    Raises ValueError for a margin below 0.
    """
    if wrong := [margin for margin in margins if not margin >= 0]:
        raise ValueError(f"the margin is {wrong[0]}; it must be 0 or more.")
    family = len(differences) if family is None else max(family, len(differences))
    losses = [found.p_lower if up else found.p_higher for found, up in zip(differences, better, strict=True)]
    gains = [found.p_higher if up else found.p_lower for found, up in zip(differences, better, strict=True)]
    ranks = {index: rank for rank, index in enumerate(sorted(range(len(losses)), key=losses.__getitem__))}
    verdicts = []
    for index, adjusted in enumerate(zip(holm(losses, family), holm(gains, family), strict=True)):
        found, margin, up = differences[index], margins[index], better[index]
        lost, gained = (value <= level for value in adjusted)
        name = _name(found, margin, up, lost=lost, gained=gained, two_sided=two_sided)
        p = gains[index] if (found.value > 0) == up else losses[index]
        own_level = level / (family - ranks[index])
        verdicts.append(Verdict(name, p, own_level, *_power(found, margin, own_level)))
    return verdicts


def _power(found: Difference, margin: float, level: float) -> tuple[float | None, int | None, int | None]:
    """`detectable`, `needed` and `fewest` of a verdict."""
    fewest = found.fewest or (math.ceil(-math.log2(level)) if found.smallest_p > level else None)
    if not found.error:
        return None, None, fewest
    smallest = None if fewest else detectable(found.error, level=level, margin=margin)
    return smallest, examples_needed(found.examples, found.error, margin), fewest


def _name(found: Difference, margin: float, up: bool, *, lost: bool, gained: bool, two_sided: bool) -> Name:
    if not found.changed:
        return "identical"
    gain = found.value if up else -found.value
    if lost and gain < -margin:
        return "worse"
    if gained and gain > margin:
        return "better"
    if found.low is None or found.high is None:
        return "unclear"
    least, most = (found.low, found.high) if up else (-found.high, -found.low)
    return "same" if least > -margin and (most < margin or not two_sided) else "unclear"


def judge_exact(base: float, new: float, margin: float, *, higher_is_better: bool) -> Name:
    """The verdict on a number without chance (FLOPs, bytes, calls): a loss beyond the margin is `worse`."""
    gain = new - base if higher_is_better else base - new
    if not gain:
        return "identical"
    return "worse" if gain < -margin else "better" if gain > margin else "same"
