"""Student's t distribution."""

from __future__ import annotations

import functools
import math

import numpy as np


def tail(t: float, freedom: int) -> float:
    """The probability that Student's t is larger (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    >>> round(tail(2.571, 5), 4), tail(0.0, 4), tail(math.inf, 4)
    (0.025, 0.5, 0.0)
    """
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    sine, cosine = math.sin(angle), math.cos(angle)
    steps = np.arange(2 + odd, freedom - 1, 2)
    total = (cosine if odd else 1.0) * (1 + float(np.cumprod(cosine**2 * (steps - 1) / steps).sum()))
    if not odd:
        return (1 - sine * total) / 2
    return 0.5 - (angle + (sine * total if freedom > 1 else 0.0)) / math.pi


@functools.cache
def quantile(freedom: int, beyond: float = 0.025) -> float:
    """The value that Student's t exceeds with probability `beyond`, found by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > beyond else (low, middle)
    return high
