"""Is a rate above or below a threshold? EncodedQuestion after every answer, and no longer than until it is certain.

An ordinary interval holds for a number of answers that was fixed before. Who looks after every answer and stops as soon as the
threshold lies outside will be wrong far more often than it says. What may be looked at at any time is a bet against each rate:
the probability of the answers under a mixture of all rates, over that under this one,

    E_n(rate) = B(s + 1/2, f + 1/2) / B(1/2, 1/2) / (rate^s (1 - rate)^f)        s yes and f no among n = s + f answers

If the rate is the true one, E_n is a nonnegative martingale that begins at 1: the probability that it ever reaches 1 / alpha is
at most alpha (Ville's inequality). So the rates with E_n < 1 / alpha contain the true one at every n at once, with
probability 1 - alpha (Robbins 1970; Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences", 2021). The mixture is Beta(1/2, 1/2), which is never much worse than the best rate in hindsight
(Krichevsky and Trofimov 1981). Answers must be independent of one another.
"""

from __future__ import annotations

import math
from typing import Literal

PRIOR = 0.5  # both parameters of the Beta mixture


def verdict(successes: int, n: int, threshold: float, alpha: float = 0.05) -> Literal["above", "below"] | None:
    """Whether the rate is above or below the threshold; None while neither is certain.

    Looked at after every answer, for ever, a wrong verdict is ever given with probability alpha at most. A rate that is exactly
    the threshold is, with probability 1 - alpha, never decided: ask a limited number of questions.

    Raises ValueError for a threshold or alpha that is no probability, and for more successes than answers.

    >>> verdict(3, 3, 0.5), verdict(9, 9, 0.5), verdict(0, 9, 0.5)
    (None, 'above', 'below')
    """
    _check(successes, n, alpha)
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold is {threshold}; a rate lies between 0 and 1.")
    if _log_evidence(successes, n, threshold) < -math.log(alpha):
        return None
    return "above" if successes > threshold * n else "below"


def confidence_sequence(successes: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """The lowest and highest rate that is not excluded after n answers: (0, 1) at first.

    The threshold lies outside exactly when there is a `verdict` about it. Raises ValueError as that does.

    >>> confidence_sequence(0, 0)
    (0.0, 1.0)
    >>> [round(bound, 3) for bound in confidence_sequence(90, 100)]
    [0.772, 0.971]
    """
    _check(successes, n, alpha)
    return _bound(successes, n, alpha), 1 - _bound(n - successes, n, alpha)


def _bound(successes: int, n: int, alpha: float) -> float:
    """The lowest rate that is not excluded. E_n falls from there to the share of successes, where it is at most 1."""
    if successes == 0:
        return 0.0
    excluded, kept = -745.0, math.log(successes / n)  # logarithms of rates: the first is that of the smallest float
    for _ in range(100):  # halves until there is no float between the two
        middle = (excluded + kept) / 2
        if _log_evidence(successes, n, math.exp(middle)) < -math.log(alpha):
            kept = middle
        else:
            excluded = middle
    return math.exp(kept)


def _log_evidence(successes: int, n: int, rate: float) -> float:
    """The logarithm of E_n(rate); infinite where an answer was seen that this rate never gives."""
    failures = n - successes
    if (rate <= 0 and successes) or (rate >= 1 and failures):
        return math.inf
    mixture = _log_beta(successes + PRIOR, failures + PRIOR) - _log_beta(PRIOR, PRIOR)
    return mixture - (successes * math.log(rate) if successes else 0.0) - (failures * math.log1p(-rate) if failures else 0.0)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _check(successes: int, n: int, alpha: float) -> None:
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n} answers: there cannot be more of them, or fewer than none.")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; the probability of ever being wrong lies between 0 and 1.")
