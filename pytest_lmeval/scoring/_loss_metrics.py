"""Compute metrics with intervals, and curves, from the sums of a text."""

from __future__ import annotations

import math

import numpy as np

from pytest_lmeval.errors import StreamError
from pytest_lmeval.records._measured import Series
from pytest_lmeval.records._metric import metric, value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring import _fast_weights as fast_weights
from pytest_lmeval.scoring._loss_accumulator import BYTES, HITS, NATS, SECONDS, STATE, TOKENS, UNIT_COLUMNS, LossAccumulator
from pytest_lmeval.statistics._estimate import ratio_intervals
from pytest_lmeval.statistics._proportion import wilson_of_sums

OF_ONE_TEXT = (
    "A thousand targets of one text are too few to show how slowly it changes. Read several documents that reach the position "
    "(as_stream=False), or compare the value itself, without knowing how sure it is."
)
LARGEST_EXPONENT = 700.0  # nats: the exponential of more is no float


def metrics_of(sums: LossAccumulator, *, seconds: float) -> dict[str, Value]:
    """The metrics of a text with their intervals, in the order of a summary."""
    total, n = sums.total, sums.tokens
    names = ["nll", *(["bits_per_byte"] if total[BYTES] else []), *(f"token_accuracy_top{k}" for k in HITS)]
    units, consecutive, found = np.array(sums.units), not sums.by_document, {}
    units = units[units[:, TOKENS] > 0]  # a share of a stream has none in some blocks
    for name in names:
        scale = metric(name).scale
        above, below = (UNIT_COLUMNS[side] for side in metric(name).sums or ())
        if above in HITS.values():
            interval = wilson_of_sums(units[:, [above, below]], consecutive=consecutive)
        else:
            (interval,) = ratio_intervals(units, [(above, below)], consecutive=consecutive)
        scaled = interval and (scale * interval[0], scale * interval[1])
        found[name] = value_of(name, scale * total[above] / total[below], scaled, n=n)
    return {
        "perplexity": exponential(found["nll"]),
        **found,
        **loss_metrics(sums),
        **(fast_weights.metrics_of(sums.fast_weights) if sums.fast_weights else {}),
        "tokens_per_second": value_of("tokens_per_second", n / seconds, n=n),
    }


def above_floor(metrics: dict[str, Value], entropy: float | None) -> dict[str, Value]:
    """The metrics and, for a text of known entropy (nats a byte), the loss of the best model and the loss above that."""
    if entropy is None or "bits_per_byte" not in metrics:
        return metrics
    loss, ln2 = metrics["bits_per_byte"], math.log(2)
    interval = loss.interval and (loss.low * ln2 - entropy, loss.high * ln2 - entropy)
    excess = value_of("excess_nats", float(loss) * ln2 - entropy, interval, n=loss.n)
    return {**metrics, "entropy_floor": value_of("entropy_floor", entropy), "excess_nats": excess}


def exponential(nll: Value, name: str = "perplexity") -> Value:
    """The perplexity of a mean loss. Raises StreamError for one that is too large for a float; it is never capped."""
    try:
        interval = nll.interval and (math.exp(nll.low), math.exp(nll.high))
        return value_of(name, math.exp(nll), interval, n=nll.n)
    except OverflowError as error:
        raise StreamError(f"the mean loss is {float(nll):.6g} nats a token: its perplexity is too large a number.") from error


def series_of(sums: LossAccumulator, metrics: dict[str, Value], *, carried: bool) -> dict[str, Series]:
    """Curves over the text, by tokens read; of the state too, if it was carried through a stream."""
    chunks, counts = sums.history
    some = chunks[:, TOKENS] > 0  # a frame may hold no code to score
    chunks, counts = chunks[some], counts[some]
    read, seconds = np.cumsum(chunks[:, TOKENS]).tolist(), (chunks[:, SECONDS] / counts).tolist()
    loss = chunks[:, NATS] / chunks[:, TOKENS]
    running = np.cumsum(chunks[:, NATS]) / np.cumsum(chunks[:, TOKENS])
    filled = np.flatnonzero(sums.by_position[:, TOKENS])
    centers, binned = 2 ** ((filled + 0.5) / 2), sums.by_position[filled]
    by_position = (binned[:, NATS] / binned[:, TOKENS]).tolist()
    series = {
        "chunk_loss": Series(read, loss.tolist(), "tokens", "nats/token"),
        **({"chunk_seconds": Series(read, seconds, "tokens", "s")} if any(seconds) else {}),
        "loss_by_position": Series(centers.tolist(), by_position, "tokens before", "nats/token", "Loss by position", "x"),
    }
    if running.max() < LARGEST_EXPONENT:
        curve = np.exp(running).tolist()
        series["running_perplexity"] = Series(read, curve, "tokens", "perplexity", "Running perplexity")
    if carried and not sums.by_document and sums.peak_state_bytes:
        series["state_bytes"] = Series(read, (chunks[:, STATE] / counts).tolist(), "tokens", "bytes", "State over the stream")
    if reached := {float(at): float(metrics[name]) for at in sums.positions if (name := name_of(at)) in metrics}:
        series["loss_at"] = Series(list(reached), list(reached.values()), "tokens before", "nats/token")
    return {**series, **(fast_weights.series_of(sums.fast_weights) if sums.fast_weights else {})}


def name_of(position: int) -> str:
    """The name of the metric.

    >>> name_of(8000), name_of(8192), name_of(1_000_000), name_of(1_500_000)
    ('loss_at_8k', 'loss_at_8192', 'loss_at_1M', 'loss_at_1500k')
    """
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if position and not position % size:
            return f"loss_at_{position // size}{letter}"
    return f"loss_at_{position}"


def not_reached(sums: LossAccumulator) -> list[int]:
    """Positions that the text does not reach."""
    tokens = sums.near_positions[..., TOKENS].sum(axis=0)
    return [position for position, count in zip(sums.positions, tokens, strict=True) if not count]


def loss_metrics(sums: LossAccumulator) -> dict[str, Value]:
    """The loss at each position that was reached (mean over the thousand targets up to it) and, for two or more, their slope.

    Intervals are over the documents that reach the position, eight at least. One text has none: the thousand targets are too
    few to show how slowly it changes. That of the slope takes each loss as linear in the sums of a document.
    """
    rows = sums.near_positions
    reached = np.flatnonzero(rows[..., TOKENS].sum(axis=0))
    if not len(reached):
        return {}
    rows, at = rows[:, reached], np.array(sums.positions)[reached]
    total = rows.sum(axis=0)
    losses = total[:, NATS] / total[:, TOKENS]
    weights = slope_weights(at / 1000)
    # The slope is a mean over units too: each unit contributes the losses, shifted by its own difference from them.
    excess = (rows[..., NATS] - losses * rows[..., TOKENS]) * len(rows) / total[:, TOKENS]
    columns = np.column_stack([rows.reshape(len(rows), -1), (losses + excess) @ weights, np.ones(len(rows))])
    ratios = [(2 * index + NATS, 2 * index + TOKENS) for index in range(len(at))] + [(2 * len(at), 2 * len(at) + 1)]
    bounds = ratio_intervals(columns, ratios)
    why = "" if sums.by_document else OF_ONE_TEXT
    found = {
        name: value_of(name, float(losses[index]), bounds[index], n=int(total[index, TOKENS]), why=why)
        for index, name in enumerate(map(name_of, at.tolist()))
    }
    if len(at) > 1:
        certain = None if None in bounds else bounds[-1]
        found["loss_slope"] = value_of("loss_slope", float(losses @ weights), certain, n=len(at), why=why)
    return found


def slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights of y in the least-squares slope of y over x; zeros for a single point.

    >>> float(slope_weights(np.array([8.0, 16.0, 24.0])) @ np.array([3.0, 2.0, 1.0]))
    -0.125
    """
    centered: np.ndarray = x - x.mean()
    return centered / max(float((centered**2).sum()), np.finfo(float).tiny)
