"""Summaries of times, which claim no more than their samples carry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pytest_lmeval.records._measured import Series
from pytest_lmeval.records._metric import metric, value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.statistics._bootstrap import FEWEST_UNITS

EXACT = 1000  # samples
STEADY, DISTURBED = 0.10, 0.25  # of the median; torch.utils.benchmark warns at the same two
SURELY_SEEN = 1.96 + 0.84  # normal quantiles: 5 % false alarms, of two sides, and 80 % power


MILLISECONDS = 1e3  # a second


def median(name: str, samples: Sequence[float], *, unit: str | None = None) -> Value:
    """The median of a metric's samples, in its unit (times are given in seconds, whatever it is), with its distribution-free
    95 % interval: the order statistics that it lies between with that probability, by the binomial distribution (its normal
    approximation, one place wider, beyond a thousand samples)."""
    ordered = np.sort(_in_unit(name, samples))
    n, interval = len(ordered), None
    if n >= FEWEST_UNITS:
        index = _index(n)
        interval = float(ordered[index]), float(ordered[n - 1 - index])
    return value_of(name, float(np.median(ordered)), interval, n=n, unit=unit)


def _in_unit(name: str, samples: Sequence[float]) -> np.ndarray:
    return np.asarray(samples) * (MILLISECONDS if metric(name).unit == "ms" else 1.0)


def _index(n: int) -> int:
    """How many of n samples may lie below the interval of the median: the most for which it is missed in 2.5 % at most."""
    if n > EXACT:
        return max(0, math.floor(n / 2 - 1.96 * math.sqrt(n) / 2) - 1)
    place, beyond, chances = 0, 1, 2**n
    while 40 * (beyond + math.comb(n, place + 1)) <= chances:
        place += 1
        beyond += math.comb(n, place)
    return place


def spread(name: str, samples: Sequence[float]) -> dict[str, Value]:
    """Mean, standard deviation, extremes and percentiles of a metric's samples, under names that begin with its.

    A percentile p is given from 10 / (1 - p) samples on: with fewer, a p99 is little more than the largest value.
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
    """How far the machine let the times be: steady, fluctuating, disturbed. None where there are too few to say.

    By their interquartile range, as a share of the median: up to 10 %, up to 25 %, more.
    """
    if len(samples) < FEWEST_UNITS:
        return None
    low, middle, high = np.quantile(np.asarray(samples), (0.25, 0.5, 0.75))
    share = (high - low) / middle
    return "steady" if share <= STEADY else "fluctuating" if share <= DISTURBED else "disturbed"


def runs_to_see(samples: Sequence[float], difference: float = 0.05) -> int | None:
    """How many runs each of two models needs, so that a difference of their means of that share is seen.

    At 5 % false alarms and 80 % power: n = 2 (1.96 + 0.84)^2 (standard deviation / (difference x mean))^2, the usual
    approximation for two normal means. It is about what runs of one process differ in; processes differ by more.
    """
    if len(samples) < FEWEST_UNITS:
        return None
    values = np.asarray(samples)
    needed = 2 * (SURELY_SEEN * float(values.std(ddof=1)) / (difference * float(values.mean()))) ** 2
    return max(1, math.ceil(needed))


def quantiles(name: str, samples: Sequence[float], title: str) -> Series:
    """The distribution as a curve: the value that this share of the samples stays below, for every second percent."""
    shares = list(range(0, 101, 2))
    values = np.quantile(_in_unit(name, samples), [share / 100 for share in shares])
    return Series([float(share) for share in shares], [float(value) for value in values], "%", metric(name).unit, title)
