"""Intervals for ratios of sums, by the bootstrap over independent units.

Perplexity, bits per byte and accuracy are all of this form: a sum over tokens divided by another sum. Tokens of one
document depend on one another, so what is drawn again is the document (the cluster), or for one long text a
block of consecutive tokens (Kuensch 1989; Miller, "Adding Error Bars to Evals", 2024).
"""

from __future__ import annotations

import numpy as np

FEWEST_UNITS = 8  # with fewer, the spread between units says next to nothing
REPLICATES = 2000


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """The percentile interval of sum(numerators) / sum(denominators) [n units each].

    None for fewer than eight units, or where a replicate would divide by zero: no interval is better than a wrong one.
    """
    units = len(numerators)
    if units < FEWEST_UNITS or not np.all(np.isfinite(numerators)):
        return None
    generator = np.random.default_rng(seed)
    ratios = []
    part = max(1, min(100, 2_000_000 // units))  # the weights of all replicates at once would not fit for many documents
    for _ in range(0, REPLICATES, part):
        weights = generator.multinomial(units, np.full(units, 1 / units), size=part)
        below = weights @ denominators
        if not np.all(below > 0):
            return None
        ratios.append(weights @ numerators / below)
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
