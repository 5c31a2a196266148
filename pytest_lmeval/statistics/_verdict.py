"""Is a number worse than it was? The verdict of a gate, from a difference, its interval, and what may be lost.

    identical   no example came out differently
    worse       the loss is larger than the margin, and too large for chance: p, after Holm, is at most 1 %
    better      the same in the other direction
    same        a loss beyond the margin is excluded: the 95 % interval ends before it (non-inferiority)
    unclear     neither: there are too few examples to tell, and it is said how many would show that nothing was lost

Only `worse` fails a test. It takes both: a difference that is significant but within the margin is allowed (the last digits
of a loss differ between two processors, and over a million tokens that is significant), and one beyond the margin that chance
brings about is no regression. The probability that a run in which nothing changed has any `worse` is at most `LEVEL`, whatever
the number of gated metrics, and whatever their margins. To demand that the loss be significantly beyond the margin would miss
many losses of a few times the margin: `benchmarks/test_gates.py` measures both, the unpaired test and a fixed threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_lmeval.statistics._paired import Difference, detectable, examples_needed, holm

LEVEL = 0.01
POWER = 0.8

Name = Literal["worse", "unclear", "better", "same", "identical"]


@dataclass(frozen=True)
class Verdict:
    """p           probability of so large a difference in its direction, had nothing changed, before Holm
    level       what p had to be at most to count: `LEVEL` over those that are left in Holm's order
    detectable  the true loss that would have been called worse with a probability of 80 %; None where none would have been
    needed      examples with which no loss would be called the same with that probability; None where that is not known
    fewest      independent units without which no loss is called worse, however large; None where there are as many
    """

    name: Name
    p: float
    level: float
    detectable: float | None
    needed: int | None
    fewest: int | None = None


def judge_all(
    differences: Sequence[Difference], margins: Sequence[float], better: Sequence[bool], *, family: int | None = None
) -> list[Verdict]:
    """The verdicts of metrics that are judged together.

    margins  what each may lose, 0 or more, in its own unit
    better   whether higher is better
    family   how many metrics are gated in the whole run, where these are some of them (see `statistics._paired.holm`)

    Raises ValueError for a margin below 0.
    """
    if wrong := [margin for margin in margins if not margin >= 0]:
        raise ValueError(f"the margin is {wrong[0]}; what may be lost is 0 or more.")
    family = len(differences) if family is None else max(family, len(differences))
    losses = [found.p_lower if up else found.p_higher for found, up in zip(differences, better, strict=True)]
    gains = [found.p_higher if up else found.p_lower for found, up in zip(differences, better, strict=True)]
    adjusted = zip(holm(losses, family), holm(gains, family), strict=True)
    ranks = {place: rank for rank, place in enumerate(sorted(range(len(losses)), key=losses.__getitem__))}
    verdicts = []
    for place, (found, (p_loss, p_gain)) in enumerate(zip(differences, adjusted, strict=True)):
        name = _name(found, margins[place], up=better[place], p_loss=p_loss, p_gain=p_gain)
        gained = (found.value > 0) == better[place]
        p, level = gains[place] if gained else losses[place], LEVEL / (family - ranks[place])
        verdicts.append(Verdict(name, p, level, *_power(found, margins[place], level)))
    return verdicts


def _power(found: Difference, margin: float, level: float) -> tuple[float | None, int | None, int | None]:
    """`detectable`, `needed` and `fewest` of a verdict."""
    fewest = math.ceil(-math.log2(level)) if found.least > level else None
    if not found.error:
        return None, None, fewest
    smallest = None if fewest else detectable(found.error, level=level, margin=margin, power=POWER)
    return smallest, examples_needed(found.examples, found.error, margin, power=POWER), fewest


def _name(found: Difference, margin: float, *, up: bool, p_loss: float, p_gain: float) -> Name:
    gain = found.value if up else -found.value
    least = found.low if up else None if found.high is None else -found.high
    if not found.changed:
        return "identical"
    if gain < -margin and p_loss <= LEVEL:
        return "worse"
    if gain > margin and p_gain <= LEVEL:
        return "better"
    return "same" if least is not None and least > -margin else "unclear"


def judge_exact(base: float, new: float, margin: float, *, higher_is_better: bool) -> Name:
    """The verdict on a number that chance has no part in (FLOPs, bytes, calls): a loss beyond the margin is `worse`.

    >>> judge_exact(100, 101, 0, higher_is_better=False), judge_exact(100, 101, 1, higher_is_better=False)
    ('worse', 'same')
    """
    gain = new - base if higher_is_better else base - new
    if not gain:
        return "identical"
    return "worse" if gain < -margin else "better" if gain > margin else "same"
