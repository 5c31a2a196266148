"""Bootstrap intervals for ratios of sums over independent units: documents, or blocks of one long text (Kuensch 1989)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

FEWEST_UNITS = 8  # fewer units say next to nothing about the spread between units
REPLICATES = 2000


def ratio_intervals(
    sums: np.ndarray, ratios: Sequence[tuple[int, int]], *, seed: int = 0, level: float = 0.95
) -> list[tuple[float, float] | None]:
    """Percentile intervals of ratios (numerator, denominator) of columns of `sums` [units, columns], from the same resamples.

    None instead of an interval for fewer than eight units, for sums that are not finite, and where a replicate divides by zero.
    """
    units = len(sums)
    if units < FEWEST_UNITS:
        return [None] * len(ratios)
    generator = np.random.default_rng(seed)
    part = max(1, min(100, 2_000_000 // units))  # limits the memory that the weights of the replicates take
    drawn = np.concatenate(
        [generator.multinomial(units, np.full(units, 1 / units), size=part) @ sums for _ in range(0, REPLICATES, part)]
    )
    return [_interval(drawn[:, above], drawn[:, below], level) for above, below in ratios]


def group_sums(columns: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """The sums of each column [n, columns] over each group [groups, columns], groups in order of first appearance."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[group] for group in groups])
    return np.column_stack([np.bincount(index, weights=column) for column in columns.T])


def _interval(above: np.ndarray, below: np.ndarray, level: float) -> tuple[float, float] | None:
    if not np.isfinite(above).all() or not (below > 0).all():
        return None
    low, high = np.quantile(above / below, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
