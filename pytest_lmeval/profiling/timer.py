"""A clock that waits for the device before it is read, and summaries that claim no more than their samples carry."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from pytest_lmeval.results.metric import Metric
from pytest_lmeval.results.record import Record
from pytest_lmeval.statistics.bootstrap import FEWEST_UNITS

Run = Callable[[], Any]


class NotMeasuredError(Exception):
    """A time was asked for that was not taken; under pytest, the test is skipped with the reason."""


def measured(record: Record, name: str) -> Metric:
    """The metric of that name. Raises NotMeasuredError where the clock was not run, KeyError if there is no such metric."""
    if reason := record.settings["not_measured"]:
        raise NotMeasuredError(f"{name} was not measured: {reason}")
    return record.metrics[name]


class Runner(Protocol):
    """Who calls the timed function: a bare loop, or pytest-benchmark."""

    def __call__(self, run: Run, *, rounds: int, warmup_rounds: int) -> str | None:
        """Call `run` warmup_rounds + rounds times. Returns why the times say nothing, or None if they do."""


def plain_runner(run: Run, *, rounds: int, warmup_rounds: int) -> str | None:
    """A bare loop, for use outside pytest."""
    for _ in range(warmup_rounds + rounds):
        run()
    return None


def clock(device: torch.device) -> float:
    """Seconds, after everything that was sent to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def median(samples: Sequence[float], unit: str, *, scale: float = 1.0, higher_is_better: bool = False) -> Metric:
    """The median with its distribution-free 95 % interval (order statistics; normal approximation of the binomial)."""
    ordered = np.sort(np.asarray(samples)) * scale
    n = len(ordered)
    low = high = None
    if n >= FEWEST_UNITS:
        half = 1.96 * np.sqrt(n) / 2
        low, high = ordered[max(0, int(np.floor(n / 2 - half)))], ordered[min(n - 1, int(np.ceil(n / 2 + half)))]
    return Metric(float(np.median(ordered)), unit, low=low, high=high, n=n, higher_is_better=higher_is_better)


def spread(name: str, samples: Sequence[float], unit: str, *, scale: float = 1.0) -> dict[str, Metric]:
    """Mean, standard deviation, extremes and percentiles of samples, under names that begin with `name`.

    A percentile p is given from 10 / (1 - p) samples on: with fewer, a p99 is little more than the largest value.
    """
    values = np.asarray(samples) * scale
    figures = {"mean": values.mean(), "min": values.min(), "max": values.max()}
    if len(values) > 1:
        figures["std"] = values.std(ddof=1)
    for percent in (90, 95, 99):
        if len(values) >= round(1000 / (100 - percent)):
            figures[f"p{percent}"] = np.quantile(values, percent / 100)
    return {
        f"{name}_{figure}": Metric(float(value), unit, n=len(values), higher_is_better=False)
        for figure, value in figures.items()
    }
