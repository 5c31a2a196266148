"""Wilson's score interval (1927) for means of values between 0 and 1, also of small samples and near 0 and 1.

Values that depend on one another (answers of one group, tokens of one text), or that are graded, count as the number of
independent answers whose interval is as wide as theirs (Korn and Graubard 1998): the effective size.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from pytest_lmeval.statistics._estimate import effective_units, group_sums, of_blocks, of_units


def wilson(
    right: Sequence[float], groups: Sequence[Hashable] | None = None, *, level: float = 0.95
) -> tuple[float, float] | None:
    """The interval of the mean of `right` [n], each between 0 and 1 (or False or True).

    groups  [n] what each answer shares with others; None, or n different ones: all answers are independent

    None for no answers, and for fewer than eight groups of answers that depend on one another. Raises ValueError for anything
    not between 0 and 1, and where the number of groups is not n.
    """
    answers = np.asarray(right, dtype=float)
    if (outside := answers[~((answers >= 0) & (answers <= 1))]).size:
        raise ValueError(f"{outside[0]} does not lie between wrong (0) and right (1).")
    if groups is not None and len(groups) != answers.size:
        raise ValueError(f"{answers.size} answers and {len(groups)} groups: each answer needs one group.")
    if not answers.size:
        return None
    size = answers.size / _spread(answers)
    if groups is None or len(set(groups)) == answers.size:
        return _score_interval(float(answers.mean()), size, level)
    return wilson_of_sums(group_sums(np.column_stack([answers, np.ones(answers.size)]), groups), most=size, level=level)


def wilson_of_sums(
    sums: np.ndarray, *, consecutive: bool = False, most: float | None = None, level: float = 0.95
) -> tuple[float, float] | None:
    """The interval of a mean of values between 0 and 1 from their sums and numbers [n, 2] over units, independent ones or
    `consecutive` blocks of one text; None for too few (see `statistics._estimate`).

    most  the effective size, were all values independent; default: their number
    """
    estimate = of_blocks(sums) if consecutive else of_units(sums)
    if estimate is None:
        return None
    mean = estimate.value
    if mean in (0, 1):  # no spread between units: assume the worst, that the values of one never differ
        return _score_interval(mean, effective_units(sums), level)
    low, high = replace(estimate, skewness=0.0).interval(level)  # the score interval itself is skewed as proportions are
    size = mean * (1 - mean) * (2 * _normal(level) / (high - low)) ** 2 if high > low else math.inf
    return _score_interval(mean, min(size, float(sums[:, 1].sum()) if most is None else most), level)


def _spread(answers: np.ndarray) -> float:
    """The variance of answers between 0 and 1 as a fraction of what it were if each were 0 or 1, with one more of each: graded
    answers that all agree do not show that none will be 0."""
    both = np.append(answers, [0.0, 1.0])
    return float(both.var() / (both.mean() * (1 - both.mean())))


def _score_interval(proportion: float, size: float, level: float) -> tuple[float, float]:
    """The proportions that a test at `1 - level` would not reject."""
    z = _normal(level)
    center = proportion + z * z / (2 * size)
    reach = z * math.sqrt(proportion * (1 - proportion) / size + z * z / (4 * size * size))
    low, high = ((center + sign * reach) / (1 + z * z / size) for sign in (-1, 1))
    return max(0.0, min(proportion, low)), min(1.0, max(proportion, high))  # rounding would exclude 0 and 1


def _normal(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
