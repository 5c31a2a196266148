"""Wilson's score interval (1927) for proportions, also of small samples and near 0 and 1.

Answers of one group count as n / design effect (Kish, "Survey Sampling", 1965); few groups estimate that poorly, so the size
shrinks by the squared ratio of the normal quantile to Student's (Korn and Graubard 1998).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from pytest_lmeval.statistics._bootstrap import FEWEST_UNITS, group_sums
from pytest_lmeval.statistics._student import quantile


def wilson(
    right: Sequence[float], groups: Sequence[Hashable] | None = None, *, level: float = 0.95
) -> tuple[float, float] | None:
    """The interval of the mean of `right` [n]: the proportion of right answers, each 0 or 1 (or False or True), or in between.

    A mean of numbers in between varies less than the same proportion of ones, since a variance within [0, 1] is at most
    p (1 - p) (Bhatia and Davis 2000): its interval is that of the proportion, and covers more often than it says.

    groups  [n] what each answer shares with others; None, or n different ones: all answers are independent

    None for no answers, and for fewer than eight groups of answers that depend on one another. Raises ValueError for
    anything beyond 0 and 1, and where the number of groups is not n.
    """
    answers = np.asarray(right, dtype=float)
    if not (possible := (answers >= 0) & (answers <= 1)).all():
        raise ValueError(f"{answers[~possible][0]} lies beyond a wrong answer (0) and a right one (1).")
    if groups is not None and len(groups) != answers.size:
        raise ValueError(f"{answers.size} answers and {len(groups)} groups: each answer needs one group.")
    if not answers.size:
        return None
    if groups is None or len(set(groups)) == answers.size:
        return _score_interval(float(answers.mean()), float(answers.size), level)
    ones, sizes = group_sums(np.column_stack([answers, np.ones(answers.size)]), groups).T
    return wilson_of_groups(ones, sizes, level=level)


def wilson_of_groups(sums: np.ndarray, sizes: np.ndarray, *, level: float = 0.95) -> tuple[float, float] | None:
    """The same interval from the number of ones [g] and of answers [g] of each group; None for fewer than eight groups."""
    groups = len(sums)
    if groups < FEWEST_UNITS:
        return None
    n, proportion = float(np.sum(sizes)), float(np.sum(sums) / np.sum(sizes))
    if proportion in (0, 1):  # no spread between groups: assume the worst, that the answers of a group never differ
        return _score_interval(proportion, float(groups), level)
    variance = groups / (groups - 1) * np.sum((sums - proportion * sizes) ** 2)  # n^2 times that of the proportion
    effect = max(1.0, variance / (n * proportion * (1 - proportion)))
    size = n / effect * (_normal(level) / quantile(groups - 1, (1 - level) / 2)) ** 2
    return _score_interval(proportion, float(size), level)


def _score_interval(proportion: float, size: float, level: float) -> tuple[float, float]:
    """The proportions that a test at `1 - level` would not reject."""
    z = _normal(level)
    center = proportion + z * z / (2 * size)
    reach = z * math.sqrt(proportion * (1 - proportion) / size + z * z / (4 * size * size))
    low, high = ((center + sign * reach) / (1 + z * z / size) for sign in (-1, 1))
    return max(0.0, min(proportion, low)), min(1.0, max(proportion, high))  # rounding would exclude 0 and 1


def _normal(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
