"""What the sums of a reading come to: metrics with their intervals, and the curves of a page."""

from __future__ import annotations

import math

import numpy as np

from pytest_lmeval.errors import StreamError
from pytest_lmeval.records._measured import Series
from pytest_lmeval.records._metric import metric, value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring import _fast_weights as fast_weights
from pytest_lmeval.scoring._loss_accumulator import BYTES, HITS, NATS, SECONDS, STATE, TOKENS, LossAccumulator
from pytest_lmeval.scoring._positions import loss_metrics, name_of
from pytest_lmeval.statistics._bootstrap import ratio_intervals

OVERFLOW = 700.0  # nats, whose exponential is no number that a float holds


def metrics_of(reading: LossAccumulator, *, seconds: float, seed: int) -> dict[str, Value]:
    """The ratios that the sums of a reading stand for, with their intervals; first those that a summary shows first."""
    columns = {"tokens": TOKENS, "nats": NATS, "bytes": BYTES, **{f"top{k}": column for k, column in HITS.items()}}
    total, n = reading.total, reading.tokens
    names = ["nll", *(["bits_per_byte"] if total[BYTES] else []), *(f"token_accuracy_top{k}" for k in HITS)]
    ratios = [tuple(columns[side] for side in metric(name).sums or ()) for name in names]
    intervals = ratio_intervals(np.array(reading.units), [(above, below) for above, below in ratios], seed=seed)
    found = {}
    for name, (above, below), interval in zip(names, ratios, intervals, strict=True):
        scale = metric(name).scale
        scaled = interval and (scale * interval[0], scale * interval[1])
        found[name] = value_of(name, scale * total[above] / total[below], scaled, n=n)
    moved = {} if reading.moves is None else fast_weights.metrics_of(reading.moves)
    return {
        "perplexity": exponential(found["nll"]),
        **found,
        **loss_metrics(reading, seed=seed),
        **moved,
        "tokens_per_second": value_of("tokens_per_second", n / seconds, n=n),
    }


def above_floor(metrics: dict[str, Value], entropy: float | None) -> dict[str, Value]:
    """The metrics, and for a text of known entropy: what the best model pays on average, and how much more was paid."""
    if entropy is None or "bits_per_byte" not in metrics:
        return metrics
    paid, ln2 = metrics["bits_per_byte"], math.log(2)
    interval = None if paid.low is None or paid.high is None else (paid.low * ln2 - entropy, paid.high * ln2 - entropy)
    excess = value_of("excess_nats", float(paid) * ln2 - entropy, interval, n=paid.n)
    return {**metrics, "entropy_floor": value_of("entropy_floor", entropy), "excess_nats": excess}


def exponential(nll: Value, name: str = "perplexity") -> Value:
    """The perplexity of a mean loss. Never capped: a loss too large for a float is an error that says so."""
    try:
        interval = None if nll.low is None or nll.high is None else (math.exp(nll.low), math.exp(nll.high))
        return value_of(name, math.exp(nll), interval, n=nll.n)
    except OverflowError as error:
        raise StreamError(
            f"the mean loss is {float(nll):.6g} nats a token; its perplexity is no number a float can hold."
        ) from error


def series_of(reading: LossAccumulator, metrics: dict[str, Value], *, carried: bool) -> dict[str, Series]:
    """The course of a reading, by tokens read; of the state too, where one was carried through a stream."""
    chunks, each = reading.course
    some = chunks[:, TOKENS] > 0  # of frames, one may hold no code to score
    chunks, each = chunks[some], each[some]
    read = np.cumsum(chunks[:, TOKENS]).tolist()
    loss = chunks[:, NATS] / chunks[:, TOKENS]
    running = np.cumsum(chunks[:, NATS]) / np.cumsum(chunks[:, TOKENS])
    filled = np.flatnonzero(reading.by_position[:, TOKENS])
    binned = reading.by_position[filled]
    series = {
        "chunk_loss": Series(read, loss.tolist(), "tokens", "nats/token"),
        "chunk_seconds": Series(read, (chunks[:, SECONDS] / each).tolist(), "tokens", "s"),
        "loss_by_position": Series(
            (2 ** ((filled + 0.5) / 2)).tolist(),
            (binned[:, NATS] / binned[:, TOKENS]).tolist(),
            "tokens before",
            "nats/token",
            "Loss by position",
            "x",
        ),
    }
    if running.max() < OVERFLOW:
        curve = np.exp(running).tolist()
        series["running_perplexity"] = Series(read, curve, "tokens", "perplexity", "Running perplexity")
    if carried and not reading.by_document and reading.peak_state_bytes:
        series["state_bytes"] = Series(read, (chunks[:, STATE] / each).tolist(), "tokens", "bytes", "State over the stream")
    if reached := {float(at): float(metrics[name]) for at in reading.positions if (name := name_of(at)) in metrics}:
        series["loss_at"] = Series(list(reached), list(reached.values()), "tokens before", "nats/token")
    return {**series, **({} if reading.moves is None else fast_weights.series_of(reading.moves))}
