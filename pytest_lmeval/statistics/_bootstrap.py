"""Intervals for ratios of sums, by the bootstrap over independent units.

Perplexity, bits per byte and accuracy are all of this form: a sum over tokens divided by another sum. Tokens of one
document depend on one another, so what is drawn again is the document (the cluster), or for one long text a
block of consecutive tokens (Kuensch 1989; Miller, "Adding Error Bars to Evals", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEWEST_UNITS = 8  # with fewer, the spread between units says next to nothing
REPLICATES = 2000


def ratio_intervals(
    sums: np.ndarray, ratios: Sequence[tuple[int, int]], *, seed: int = 0, level: float = 0.95
) -> list[tuple[float, float] | None]:
    """Percentile intervals of ratios of columns of `sums` [units, columns], the same units drawn for all of them.

    ratios  pairs of columns: numerator, denominator

    None in place of an interval for fewer than eight units, for sums that are not finite, and where a replicate would
    divide by zero: no interval is better than a wrong one.
    """
    units = len(sums)
    if units < FEWEST_UNITS:
        return [None] * len(ratios)
    generator = np.random.default_rng(seed)
    part = max(1, min(100, 2_000_000 // units))  # the weights of all replicates at once would not fit for many documents
    drawn = np.concatenate(
        [generator.multinomial(units, np.full(units, 1 / units), size=part) @ sums for _ in range(0, REPLICATES, part)]
    )
    return [_interval(drawn[:, above], drawn[:, below], level) for above, below in ratios]


def _interval(above: np.ndarray, below: np.ndarray, level: float) -> tuple[float, float] | None:
    if not np.isfinite(above).all() or not (below > 0).all():
        return None
    low, high = np.quantile(above / below, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
