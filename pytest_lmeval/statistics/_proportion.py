"""Intervals for a share of right answers, by Wilson's score (1927), for small samples and shares near 0 and 1 too.

Answers about one passage depend on one another, so that n of them say less than n independent ones would: as much as n
divided by the design effect, the variance of their share over that of as many independent answers (Kish, "Survey
Sampling", 1965). Wilson's interval with this effective sample size is among those that Franco, Little, Louis and Slud found to
cover well ("Comparative study of confidence intervals for proportions in complex sample surveys", 2019). The design effect is
estimated from few groups, so the effective size is made smaller once more, as Korn and Graubard (1998) do: by the square of
the normal quantile over Student's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from pytest_lmeval.statistics._bootstrap import FEWEST_UNITS


def wilson(
    right: Sequence[float], groups: Sequence[Hashable] | None = None, *, level: float = 0.95
) -> tuple[float, float] | None:
    """The interval of the share of ones among `right`, each 0 or 1 (or False or True).

    groups  what each answer shares with others, as long as `right`; None, or each its own: all are independent

    None in place of an interval for no answers, and for fewer than eight groups of answers that depend on one another.
    Raises ValueError for anything but zeros and ones, and for another number of groups than of answers.

    >>> [round(bound, 4) for bound in wilson([1] * 9 + [0])]
    [0.5958, 0.9821]
    """
    answers = np.asarray(right, dtype=float)
    if not np.isin(answers, (0, 1)).all():
        raise ValueError(f"{answers[~np.isin(answers, (0, 1))][0]} is neither right (1) nor wrong (0): it has no share.")
    if not answers.size:
        return None
    size = float(answers.size) if groups is None else _effective_size_of(answers, groups, level)
    return None if size is None else _score_interval(float(answers.mean()), size, _normal(level))


def wilson_of_groups(sums: np.ndarray, sizes: np.ndarray, *, level: float = 0.95) -> tuple[float, float] | None:
    """The same from the ones [g] and the answers [g] of each group alone, for answers too many to be held."""
    size = _effective_size(np.asarray(sums, dtype=float), np.asarray(sizes, dtype=float), level)
    return None if size is None else _score_interval(float(np.sum(sums) / np.sum(sizes)), size, _normal(level))


def _score_interval(share: float, size: float, z: float) -> tuple[float, float]:
    """The shares that a test of size `1 - level` would not reject, given the share of `size` answers."""
    center = share + z * z / (2 * size)
    reach = z * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    low, high = ((center + sign * reach) / (1 + z * z / size) for sign in (-1, 1))
    return max(0.0, min(share, low)), min(1.0, max(share, high))  # rounding would leave out shares of 0 and 1


def _effective_size_of(right: np.ndarray, groups: Sequence[Hashable], level: float) -> float | None:
    """How many independent answers would say as much; None where there are too few groups to tell."""
    if len(groups) != right.size:
        raise ValueError(f"{right.size} answers and {len(groups)} groups: each answer has one.")
    place = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    if len(place) == right.size:
        return float(right.size)
    of = np.array([place[group] for group in groups])
    return _effective_size(np.bincount(of, weights=right), np.bincount(of), level)


def _effective_size(sums: np.ndarray, sizes: np.ndarray, level: float) -> float | None:
    if len(sums) < FEWEST_UNITS:
        return None
    count, share = sizes.sum(), sums.sum() / sizes.sum()
    if share in (0, 1):  # the spread between groups is zero, and says nothing: the worst case
        return float(len(sums))
    degrees = len(sums) - 1
    spread = len(sums) / degrees * np.sum((sums - share * sizes) ** 2)  # n^2 times the variance of the share
    effect = max(1.0, spread / (count * share * (1 - share)))
    return float(count / effect * (_normal(level) / _student(level, degrees)) ** 2)


def _normal(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _student(level: float, degrees: int) -> float:
    """Student's quantile by its expansion around the normal one (Abramowitz and Stegun 26.7.5); within 0.001 from 7 degrees."""
    z = _normal(level)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
