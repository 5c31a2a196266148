"""Compare answers that are drawn at random: each question is answered several times, and another run draws other answers.

The answers of a run to one question are draws from one distribution, so their spread tells how much the mean of a run changes
from run to run where nothing changed: no bar has to be guessed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from statistics import NormalDist, fmean

import numpy as np

from pytest_lmeval.statistics._paired import Difference, paired_difference

Answers = Sequence[Sequence[float]]
"""[questions] [answers to each] what each answer counts."""

MOST_ANSWERS = 1000  # to a question; more are not asked of a user


def between_runs(answers: Answers) -> float | None:
    """The standard deviation of the mean of all answers from run to run, where each run draws as many answers to the same
    questions; None where no question has two answers.

    >>> between_runs([[1, 1, 0, 0], [1, 1, 1, 1]]), between_runs([[1], [0]])
    (0.14433756729740643, None)
    """
    variance = _variance(answers)
    return None if variance is None else math.sqrt(variance / sum(map(len, answers)))


def drawn_difference(
    base: Answers, new: Answers, groups: Sequence[Hashable] | None = None, *, level: float = 0.01
) -> Difference:
    """The difference of the means over n questions, each answered at least once in both runs, in whatever numbers.

    groups  [n] what each question shares with others; None: all are independent

    Questions are the units (`paired_difference` of the means of their answers), so the spread of their differences holds both
    what changed and what chance drew; `noise` is the latter alone. Where answers are right or wrong, `dealt_again` counts too:
    the larger probability.

    Raises ValueError for lists of different lengths, and for questions without an answer.
    """
    if not all(map(len, (*base, *new))):
        raise ValueError("a question without an answer cannot be compared.")
    draws = fmean(1 / len(before) + 1 / len(after) for before, after in zip(base, new, strict=True))
    before, after = ([fmean(one) for one in side] for side in (base, new))
    found = paired_difference(before, after, groups=groups, answers=2 / draws, level=level)
    if (variance := _variance([*base, *new])) is None:
        return found
    found = replace(found, noise=math.sqrt(variance * draws / len(base)))
    if {score for one in (*base, *new) for score in one} <= {0, 1}:
        lower, higher = dealt_again(base, new)
        lower, higher = max(lower, found.p_lower), max(higher, found.p_higher)
        found = replace(found, p_lower=lower, p_higher=higher, test=f"an exact test of answers dealt again, {found.test}")
    return found


def dealt_again(base: Answers, new: Answers) -> tuple[float, float]:
    """The exact probabilities of so few and of so many right answers of `new`, if the right answers to each question (1, the
    others 0) were dealt at random to the answers of both runs.

    The conditional test of strata of Cochran (1954) and Mantel and Haenszel (1959); McNemar's where each run answers once.

    >>> dealt_again([[1], [1], [1], [0]], [[0], [0], [0], [0]])
    (0.125, 1.0)
    """
    strata = Counter(
        (len(before), len(after), round(sum(before) + sum(after))) for before, after in zip(base, new, strict=True)
    )
    counted = round(sum(map(sum, new)))
    size = 1 + sum(map(len, new))
    spectrum = np.ones(size // 2 + 1, dtype=complex)
    for (before, after, right), count in strata.items():
        dealt = [math.comb(after, k) * math.comb(before, right - k) if k <= right else 0 for k in range(after + 1)]
        spectrum *= np.fft.rfft(np.array(dealt, dtype=float) / math.comb(before + after, right), size) ** count
    chances = np.maximum(np.fft.irfft(spectrum, size), 0.0)
    lower, higher = float(chances[: counted + 1].sum()), float(chances[counted:].sum())
    return round(min(lower, 1.0), 14), round(min(higher, 1.0), 14)  # sums of rounded waves are exact to about 1e-15


def answers_needed(found: Difference, margin: float, answers: tuple[float, float], *, power: float = 0.8) -> int | None:
    """How many answers to each of these questions, in both runs, show with probability `power` that no more than the margin was
    lost, if nothing was; None where more answers alone do not, and for more than a thousand.

    answers  the mean number of answers to a question, in each run
    """
    if not found.noise or found.error is None:
        return None
    reach = margin / (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power))
    of_questions = max(found.error**2 - found.noise**2, 0.0)  # what stays, however often each is answered
    if reach**2 <= of_questions:
        return None
    once = 2 * found.noise**2 / sum(1 / count for count in answers)  # the variance of a difference of one answer and one
    needed = math.ceil(round(once / (reach**2 - of_questions), 6))
    return needed if needed <= MOST_ANSWERS else None


def _variance(answers: Answers) -> float | None:
    """The mean variance of an answer to one question; None where no question has two answers."""
    freedom = sum(len(one) - 1 for one in answers)
    if not freedom:
        return None
    return math.fsum((score - fmean(one)) ** 2 for one in answers if len(one) > 1 for score in one) / freedom
