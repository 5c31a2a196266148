"""The loss at chosen places of a text, and its slope: does a longer context go on helping?

The loss at a place is the mean over the thousand tokens up to there. In a stream its interval is drawn from blocks of fifty of
them, in a reading by document from the documents that reach it (`statistics._bootstrap`).
"""

from __future__ import annotations

import numpy as np

from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._loss_accumulator import NATS, PLACES, SPAN, SPAN_BLOCK, TOKENS, LossAccumulator
from pytest_lmeval.statistics._bootstrap import FEWEST_UNITS, ratio_intervals


def name_of(position: int) -> str:
    """The metric's name.

    >>> name_of(8000), name_of(8192), name_of(1_000_000)
    ('loss_at_8k', 'loss_at_8192', 'loss_at_1M')
    """
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if position and not position % size:
            return f"loss_at_{position // size}{letter}"
    return f"loss_at_{position}"


def sums_at(reading: LossAccumulator) -> np.ndarray:
    """Tokens and nats [units, positions, 2] of what went on to the last fifty places before a position; the rest is zero."""
    sums = np.array(reading.at_positions).reshape(len(reading.at_positions), len(reading.positions), PLACES + 1)
    read = sums[..., PLACES] if reading.by_document else sums[..., PLACES].sum(axis=0)
    enough = np.maximum(0, np.minimum(SPAN, reading.positions) - SPAN_BLOCK)
    return np.where((read > enough)[..., None], sums[..., :PLACES], 0.0)


def not_reached(reading: LossAccumulator) -> list[int]:
    """Positions that the text did not go on to."""
    tokens = sums_at(reading)[..., TOKENS].sum(axis=0)
    return [position for position, count in zip(reading.positions, tokens, strict=True) if not count]


def loss_metrics(reading: LossAccumulator, *, seed: int) -> dict[str, Value]:
    """The loss at each position that was reached, and their slope if there are two at least, with 95 % intervals.

    Intervals are None for fewer than eight blocks or documents. That of the slope takes each loss as linear in the sums of a
    unit, which it is in a stream, where all blocks are of the same size.
    """
    sums = sums_at(reading)
    reached = np.flatnonzero(sums[..., TOKENS].sum(axis=0))
    if not len(reached):
        return {}
    sums, at = sums[:, reached], np.array(reading.positions)[reached]
    total = sums.sum(axis=0)
    losses = total[:, NATS] / total[:, TOKENS]
    weights = slope_weights(at / 1000)
    # The slope is a sum over units too: each brings what it adds to the losses, beside their means.
    excess = (sums[..., NATS] - losses * sums[..., TOKENS]) * len(sums) / total[:, TOKENS]
    columns = np.column_stack([sums.reshape(len(sums), -1), (losses + excess) @ weights, np.ones(len(sums))])
    ratios = [(2 * index + NATS, 2 * index + TOKENS) for index in range(len(at))] + [(2 * len(at), 2 * len(at) + 1)]
    intervals = ratio_intervals(columns, ratios, seed=seed)
    units = (sums[..., TOKENS] > 0).sum(axis=0)
    bounds = [interval if count >= FEWEST_UNITS else None for interval, count in zip(intervals, units, strict=False)]
    names = [name_of(int(position)) for position in at]
    found = {
        name: value_of(name, float(losses[index]), bounds[index], n=int(total[index, TOKENS]))
        for index, name in enumerate(names)
    }
    if len(at) > 1:
        certain = None if None in bounds else intervals[-1]
        found["loss_slope"] = value_of("loss_slope", float(losses @ weights), certain, n=len(at))
    return found


def slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights of y in the least-squares slope of y over x; zeros for a single point.

    >>> float(slope_weights(np.array([8.0, 16.0, 24.0])) @ np.array([3.0, 2.0, 1.0]))
    -0.125
    """
    centered: np.ndarray = x - x.mean()
    return centered / max(float((centered**2).sum()), np.finfo(float).tiny)
