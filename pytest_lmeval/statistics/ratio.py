"""Is one thing slower than another, when the machine is not the same from minute to minute? Pairs of runs, side by side.

What disturbs a machine disturbs both runs of a pair, so each pair gives one logarithm of a ratio, and the pairs, not the rounds
within a run, are the sample: rounds of one process share its luck, and more of them only make a wrong answer surer.

    worse     the 95 % interval of the ratio excludes 1, and the ratio is beyond the threshold
    better    the same in the other direction
    same      the interval lies within the threshold on both sides
    unclear   neither, yet
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

Verdict = Literal["worse", "better", "same", "unclear"]

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""The 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Ratio:
    """new / base, with its 95 % interval over n pairs (Student's t of the logarithms); no interval for a single pair."""

    value: float
    low: float | None
    high: float | None
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
    middle = fmean(logs)
    if len(logs) == 1:
        return Ratio(math.exp(middle), None, None, 1)
    half = quantile(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(logs))


def quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t; beyond the table by the first terms of its expansion (Cornish and Fisher 1937)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def judge(found: Ratio, threshold: float, *, higher_is_better: bool) -> Verdict:
    """What the ratio says of a metric; see the head of this file. The threshold is a share: 0.05 is 5 %."""
    if found.low is None or found.high is None:
        return "unclear"
    if found.low > 1 and found.value > 1 + threshold:
        return "better" if higher_is_better else "worse"
    if found.high < 1 and found.value < 1 / (1 + threshold):
        return "worse" if higher_is_better else "better"
    return "same" if found.low >= 1 / (1 + threshold) and found.high <= 1 + threshold else "unclear"
