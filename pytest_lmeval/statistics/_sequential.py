"""Decide after every answer whether a rate is above or below a threshold, and stop as soon as it is certain.

    E_n(rate) = B(s + 1/2, f + 1/2) / B(1/2, 1/2) / (rate^s (1 - rate)^f)        s yes and f no among n = s + f answers

At the true rate, E_n is a nonnegative martingale that begins at 1: it ever reaches 1 / alpha with probability at most alpha
(Ville's inequality; Robbins 1970; Howard et al., "Time-uniform, nonparametric, nonasymptotic confidence sequences", 2021). The
mixture is Beta(1/2, 1/2) (Krichevsky and Trofimov 1981). Answers must be independent of one another.
"""

from __future__ import annotations

import math
from typing import Literal

PRIOR = 0.5  # both parameters of the Beta mixture


def verdict(successes: int, n: int, threshold: float, alpha: float = 0.05) -> Literal["above", "below"] | None:
    """Whether the rate is above or below the threshold; None while neither is certain.

    Checked after every answer, it is ever wrong with probability at most alpha. A rate equal to the threshold stays undecided
    with probability 1 - alpha, so limit the number of questions.

    Raises ValueError where threshold or alpha is no probability, and for more successes than answers.
    """
    _check(successes, n, alpha)
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold is {threshold}; a rate lies between 0 and 1.")
    if _log_evidence(successes, n, threshold) < -math.log(alpha):
        return None
    return "above" if successes > threshold * n else "below"


def confidence_sequence(successes: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """The lowest and highest rate that n answers do not exclude; (0, 1) for n = 0.

    `verdict` decides exactly the thresholds outside. Raises ValueError as `verdict` does.
    """
    _check(successes, n, alpha)
    return _bound(successes, n, alpha), 1 - _bound(n - successes, n, alpha)


def _bound(successes: int, n: int, alpha: float) -> float:
    """The lowest rate that is not excluded: below the observed rate, where E_n is at most 1, E_n only falls."""
    if successes == 0:
        return 0.0
    excluded, kept = -745.0, math.log(successes / n)  # logarithms of rates, the first that of the smallest float
    for _ in range(100):  # until no float lies between the two
        middle = (excluded + kept) / 2
        if _log_evidence(successes, n, math.exp(middle)) < -math.log(alpha):
            kept = middle
        else:
            excluded = middle
    return math.exp(kept)


def _log_evidence(successes: int, n: int, rate: float) -> float:
    """The logarithm of E_n(rate); infinite where the rate never gives an answer that was seen."""
    failures = n - successes
    if (rate <= 0 and successes) or (rate >= 1 and failures):
        return math.inf
    mixture = _log_beta(successes + PRIOR, failures + PRIOR) - _log_beta(PRIOR, PRIOR)
    return mixture - (successes * math.log(rate) if successes else 0.0) - (failures * math.log1p(-rate) if failures else 0.0)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _check(successes: int, n: int, alpha: float) -> None:
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n} answers; there can be 0 to {n}.")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; a probability of error lies between 0 and 1.")
