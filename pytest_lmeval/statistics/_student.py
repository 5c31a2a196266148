"""Student's t distribution."""

from __future__ import annotations

import functools
import math

import numpy as np


def tail(t: float | np.ndarray, freedom: float) -> np.ndarray:
    """The probability that Student's t is larger, for one or several t (Abramowitz and Stegun, 26.7.3 and 26.7.4); between
    whole degrees of freedom, interpolated by their inverse.

    >>> round(float(tail(2.571, 5)), 4), float(tail(0.0, 4)), float(tail(math.inf, 4))
    (0.025, 0.5, 0.0)
    """
    low = math.floor(freedom)
    if low == freedom:
        return _tail(t, low)
    part = (1 / low - 1 / freedom) / (1 / low - 1 / (low + 1))
    return (1 - part) * _tail(t, low) + part * _tail(t, low + 1)


@functools.cache
def quantile(freedom: float, beyond: float = 0.025) -> float:
    """The value that Student's t exceeds with probability `beyond`, found by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > beyond else (low, middle)
    return high


def _tail(t: float | np.ndarray, freedom: int) -> np.ndarray:
    angle, odd = np.arctan(np.asarray(t) / math.sqrt(freedom)), freedom % 2
    sine, cosine = np.sin(angle), np.cos(angle)
    steps = np.arange(2 + odd, freedom - 1, 2)
    factors = cosine[..., None] ** 2 * (steps - 1) / steps
    total = (cosine if odd else 1.0) * (1 + np.cumprod(factors, axis=-1).sum(axis=-1))
    found: np.ndarray = 0.5 - (angle + (sine * total if freedom > 1 else 0.0)) / math.pi if odd else (1 - sine * total) / 2
    return found
