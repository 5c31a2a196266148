"""Is one thing slower than another, when the machine is not the same from minute to minute? Pairs of runs, side by side.

What disturbs a machine disturbs both runs of a pair, so each pair gives one logarithm of a ratio, and the pairs, not the rounds
within a run, are the sample: rounds of one process share its luck, and more of them only make a wrong answer surer.

    worse     beyond the threshold, and too far for chance: p, after Holm, is at most the level
    better    the same in the other direction
    same      the 95 % interval lies within the threshold on both sides
    unclear   neither
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from pytest_lmeval.statistics._paired import holm

Verdict = Literal["worse", "better", "same", "unclear"]


@dataclass(frozen=True)
class Ratio:
    """new / base over n pairs, its 95 % interval, and how likely chance alone brings so large a ratio, or so small a one
    (Student's t of the logarithms). A single pair has neither interval nor evidence."""

    value: float
    low: float | None
    high: float | None
    p_larger: float
    p_smaller: float
    n: int


def ratio(base: Sequence[float], new: Sequence[float]) -> Ratio:
    """The geometric mean of new[i] / base[i].

    >>> round(ratio([1.0, 2.0, 4.0], [1.1, 2.2, 4.4]).value, 9)
    1.1

    Raises ValueError for values that are not positive, and where there is not one of each for every pair.
    """
    if len(base) != len(new) or not len(base) or min(*base, *new) <= 0:
        raise ValueError(f"a ratio takes pairs of positive numbers; got {list(base)} and {list(new)}.")
    logs = [math.log(after / before) for before, after in zip(base, new, strict=True)]
    middle, freedom = fmean(logs), len(logs) - 1
    if not freedom:
        return Ratio(math.exp(middle), None, None, 1.0, 1.0, 1)
    error = stdev(logs) / math.sqrt(len(logs))
    half, beyond = quantile(freedom) * error, tail(middle / error if error else math.copysign(math.inf, middle), freedom)
    if not middle:
        beyond = 0.5
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half), beyond, 1 - beyond, len(logs))


def tail(t: float, freedom: int) -> float:
    """The probability that Student's t is larger (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    >>> round(tail(2.571, 5), 4), tail(0.0, 4), tail(math.inf, 4)
    (0.025, 0.5, 0.0)
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if math.isinf(t):
        sine, cosine = math.copysign(1.0, t), 0.0
    term = total = cosine if freedom % 2 else 1.0
    for step in range(2 + freedom % 2, freedom - 1, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    within = sine * total if freedom % 2 == 0 else 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
    return (1 - within) / 2


def quantile(freedom: int, beyond: float = 0.025) -> float:
    """What Student's t exceeds with that probability, by halving."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > beyond else (low, middle)
    return high


def judge_all(
    found: Sequence[Ratio], thresholds: Sequence[float], higher_is_better: Sequence[bool], *, level: float
) -> list[Verdict]:
    """The verdicts of numbers that are judged together; see the head of this file.

    thresholds  shares: 0.05 is 5 %
    level       the probability that any of them is called worse, or any better, where nothing changed
    """
    losses = holm([one.p_smaller if up else one.p_larger for one, up in zip(found, higher_is_better, strict=True)])
    gains = holm([one.p_larger if up else one.p_smaller for one, up in zip(found, higher_is_better, strict=True)])
    rows = zip(found, thresholds, losses, gains, strict=True)
    return [_judge(one, threshold, lost <= level, won <= level) for one, threshold, lost, won in rows]


def _judge(found: Ratio, threshold: float, lost: bool, won: bool) -> Verdict:
    size = abs(math.log(found.value))
    if (lost or won) and size > math.log1p(threshold):
        return "worse" if lost else "better"
    if found.low is None or found.high is None:
        return "unclear"
    return "same" if found.low >= 1 / (1 + threshold) and found.high <= 1 + threshold else "unclear"
