"""Summarize times: medians, percentiles, intervals, as far as the number of samples supports them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pytest_lmeval.records._measured import Series
from pytest_lmeval.records._metric import metric, value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.statistics._estimate import FEWEST_UNITS

EXACT = 1000  # samples
STEADY, DISTURBED = 0.10, 0.25  # of the median; torch.utils.benchmark warns at the same two
DETECTED = 1.96 + 0.84  # normal quantiles: 5 % false alarms (two-sided) and 80 % power
MILLISECONDS = 1e3  # a second


def median(name: str, samples: Sequence[float], *, unit: str | None = None, runs: int | None = None) -> Value:
    """The median of a metric's samples, in its unit (times are given in seconds), with its distribution-free 95 % interval:
    the order statistics that it lies between by the binomial distribution (beyond a thousand samples, by its normal
    approximation, widened by one sample on each side).

    runs  the samples are, in order, those of so many runs: samples of one run are alike, so the interval is that of the
          medians of the runs
    """
    values = _in_unit(name, samples)
    ordered = np.sort(values if runs is None else np.median(values.reshape(runs, -1), axis=1))
    n, interval = len(ordered), None
    if n >= FEWEST_UNITS:
        index = _index(n)
        interval = float(ordered[index]), float(ordered[n - 1 - index])
    return value_of(name, float(np.median(values)), interval, n=len(values), unit=unit)


def _in_unit(name: str, samples: Sequence[float]) -> np.ndarray:
    return np.asarray(samples) * (MILLISECONDS if metric(name).unit == "ms" else 1.0)


def _index(n: int) -> int:
    """The largest index of an ordered sample that the median falls below with a probability of at most 2.5 %."""
    if n > EXACT:
        return max(0, math.floor(n / 2 - 1.96 * math.sqrt(n) / 2) - 1)
    index, below, outcomes = 0, 1, 2**n
    while 40 * (below + math.comb(n, index + 1)) <= outcomes:
        index += 1
        below += math.comb(n, index)
    return index


def spread(name: str, samples: Sequence[float]) -> dict[str, Value]:
    """Mean, standard deviation, extremes and percentiles of a metric's samples, as NAME_mean and so on.

    A percentile p needs 10 / (1 - p) samples: with fewer, a p99 is little more than the largest value.
    """
    values = _in_unit(name, samples)
    figures = {"mean": values.mean(), "min": values.min(), "max": values.max()}
    if len(values) > 1:
        figures["std"] = values.std(ddof=1)
    for percent in (90, 95, 99):
        if len(values) >= round(1000 / (100 - percent)):
            figures[f"p{percent}"] = np.quantile(values, percent / 100)
    return {f"{name}_{figure}": value_of(f"{name}_{figure}", float(value), n=len(values)) for figure, value in figures.items()}


def stability(samples: Sequence[float]) -> str | None:
    """How steady the machine was: steady, fluctuating or disturbed, for an interquartile range of up to 10 %, up to 25 %, or
    more of the median. None if there are too few samples."""
    if len(samples) < FEWEST_UNITS:
        return None
    low, middle, high = np.quantile(np.asarray(samples), (0.25, 0.5, 0.75))
    fraction = (high - low) / middle
    return "steady" if fraction <= STEADY else "fluctuating" if fraction <= DISTURBED else "disturbed"


def runs_to_see(samples: Sequence[float], difference: float = 0.05) -> int | None:
    """The number of runs of each of two models that shows a relative difference of their means; None for too few samples.

    At 5 % false alarms and 80 % power: n = 2 (1.96 + 0.84)^2 (standard deviation / (difference x mean))^2, the usual
    approximation for two normal means. It covers the variation between runs of one process; processes vary more.
    """
    if len(samples) < FEWEST_UNITS:
        return None
    values = np.asarray(samples)
    needed = 2 * (DETECTED * float(values.std(ddof=1)) / (difference * float(values.mean()))) ** 2
    return max(1, math.ceil(needed))


def quantiles(name: str, samples: Sequence[float], title: str) -> Series:
    """The distribution as a curve: at every second percent, the value that this part of the samples stays below."""
    percents = np.arange(0.0, 101.0, 2.0)
    values = np.quantile(_in_unit(name, samples), percents / 100)
    return Series(percents.tolist(), values.tolist(), "%", metric(name).unit, title)
