"""Compute the metrics of a task from its answered questions; n is their number, those of one group are one unit.

Means of scores between 0 and 1 have Wilson's interval, other means and perplexity that of Student's t over units. A statistic
that is no mean is computed again for 500 draws of units, without an interval if one is undefined. Below eight units only
independent scores between 0 and 1 have an interval.
"""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from msgspec import structs

from pytest_lmeval import registry
from pytest_lmeval.errors import RegistryError, TaskError
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._metric import Estimate, Metric, is_declared, metric as declared
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._answer_metrics import indices_of, unit_of
from pytest_lmeval.statistics._estimate import FEWEST_UNITS, ratio_intervals
from pytest_lmeval.statistics._proportion import wilson
from pytest_lmeval.statistics._sequential import confidence_sequence
from pytest_lmeval.tasks._task import Combine

LIBRARIES = {"sklearn": "scikit-learn", "sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "torchmetrics": "torchmetrics"}

DRAWS, FEW_DRAWS = 500, 100  # of rows, for the interval of what is no mean
SLOW = ("bleu", "chrf", "ter")  # of a whole corpus

LM_EVAL_NAMES = {
    "acc": "accuracy",  # of lambada: greedy_match
    "acc_norm": "accuracy_per_character",
    "acc_bytes": "accuracy_per_byte",
    "bleu": "bleu",
    "em": "exact_match",
    "exact": "exact_match",
    "exact_match": "exact_match",  # of choices: greedy_match
    "f1": "f1",  # of cb: f1_macro; of record and squadv2: squad_f1
    "mcc": "matthews",
    "perplexity": "perplexity",
    "HasAns_exact": "has_answer_exact_match",
    "HasAns_f1": "has_answer_f1",
    "NoAns_exact": "no_answer_accuracy",
}
"""Names of lm-evaluation-harness, and ours. Where it calls several metrics by one name, its task tells which is meant."""


def metrics_of(names: Sequence[str], task: str) -> list[Metric]:
    """The metrics of these names. Raises TaskError for a name that is no metric of answers, and a library that is missing."""
    found = []
    for name in names:
        asks = f"{task} asks for the metric {name!r}"
        try:
            if not is_declared(name) or "*" in name:
                raise registry.unknown("metrics", name)
            metric = declared(name)
        except RegistryError as error:
            ours = f" lm_eval's {name!r} is {LM_EVAL_NAMES[name]} here." if name in LM_EVAL_NAMES else ""
            raise TaskError(f"{asks}:{ours} {error}") from None
        if metric.score is None and metric.statistic is None and metric.several is None:
            raise TaskError(f"{asks}, which is none of answers: it has no score of an example.")
        try:
            if metric.library is not None:
                import_module(metric.library)
        except ImportError as error:
            package = LIBRARIES.get(str(metric.library), metric.library)
            install = "'pytest-lmeval[tasks]'" if metric.library in LIBRARIES else package
            what = f"which is computed by {package}. That cannot be imported ({error})"
            raise TaskError(f"{asks}, {what}: pip install {install}") from error
        found.append(metric)
    return found


def combined_metrics(combine: Combine, values: Mapping[int, Mapping[str, Any]]) -> list[Metric]:
    """The metrics of a task that another harness scores, from the numbers of its rows, in the order in which rows have them."""
    by_name: dict[str, dict[int, Any]] = {}
    for row, found in values.items():
        for name, value in found.items():
            by_name.setdefault(name, {})[row] = value
    return [_combined_metric(name, combine, of_rows) for name, of_rows in by_name.items()]


def _combined_metric(name: str, combine: Combine, values: Mapping[int, Any]) -> Metric:
    """A mean of numbers has the interval of a mean; anything else is computed again for draws of rows. NaN is no value: the
    metric is about none of the rows."""
    function, better = combine(name)
    numbers = [float(value) for value in values.values() if isinstance(value, int | float | np.number | np.bool_)]
    known = len(numbers) == len(values) and not any(map(math.isnan, numbers))
    if getattr(function, "__name__", "") == "mean" and known:
        judges = better is True and all(0 <= number <= 1 for number in numbers)
        score = kept_score(name)
        return Metric(name, higher_is_better=better, score=score, interval="mean", judges=judges)

    def statistic(examples: Sequence[Example], seed: int) -> Estimate | None:
        given = [values[example.number] for example in examples if example.number in values]
        number, interval = float(function(list(given))), None
        if math.isnan(number):
            return None
        if len(given) >= FEWEST_UNITS:
            draws = np.random.default_rng(seed).integers(len(given), size=(FEW_DRAWS if name in SLOW else DRAWS, len(given)))
            with contextlib.suppress(Exception):  # a draw without one of the labels
                again = [float(function([given[index] for index in draw])) for draw in draws]
                low, high = np.quantile(again, [0.025, 0.975])
                interval = (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None
        return number, interval

    return Metric(name, higher_is_better=better, statistic=statistic)


def kept_score(name: str) -> Callable[[Example], float | None]:
    """The score of an example in a metric that was scored before."""
    return lambda example: example.scores.get(name)


def scored(example: Example, metrics: Sequence[Metric]) -> dict[str, float | None]:
    """The score of an example in each metric that has one; None where the metric is not about it.

    Raises TaskError for an example without what a metric needs, and for a metric that fails or gives a number it may not give.
    """
    for metric in metrics:
        if not metric.can_score(example.choices, example.right, example.targets):
            raise TaskError(
                f"{metric.name} is computed from {metric.needs}, and question {example.number} (id {example.id}) has "
                f"{len(example.choices)} choices, right are {list(example.right)}, its output is {example.output!r}, its "
                f"targets are {list(example.targets)!r}. Ask for another metric (`lmeval list metrics`)."
            )
    return {metric.name: _score(metric, example) for metric in metrics if metric.score is not None}


def _score(metric: Metric, example: Example) -> float | None:
    """The mean over the choices that share a tie, each taken for the chosen one, of those that the metric is about."""
    found = [_score_of(metric, one) for one in example.resolved(metric.norm or "sum")]
    scores = [score for score in found if score is not None]
    return None if not scores else scores[0] if len(set(scores)) == 1 else math.fsum(scores) / len(scores)


def _score_of(metric: Metric, example: Example) -> float | None:
    assert metric.score is not None
    what = f"the score of {metric.name} of question {example.number} (id {example.id})"
    try:
        score = metric.score(example)
        number = None if score is None else float(score)
    except Exception as error:
        raise TaskError(f"{what} failed with {type(error).__name__}: {error}. The metric needs the score.") from error
    binary = metric.interval == "proportion"
    if number is not None and not (number in (0, 1) if binary else math.isfinite(number)):
        wanted = "1 or 0, as interval='proportion' needs" if binary else "a finite number"
        raise TaskError(f"{what} is {number}. Return {wanted}, or None where the metric is not about that question.")
    return number


def compute(
    metrics: Sequence[Metric], examples: Iterable[Example], seed: int = 0, threshold: float | None = None
) -> dict[str, Value]:
    """The values of metrics on scored examples, in any order. A metric that is about none of them is left out.

    threshold  `Task.threshold`, if asking may have ended early: the rate then has an interval that holds after every answer at
               once (see `statistics._sequential`)
    """
    scores = Scores(metrics)
    for example in examples:
        scores.add(example)
    found = scores.values(seed)
    if threshold is not None and (rate := found.get("rate")) is not None:
        n = rate.n or 0
        found["rate"] = declared("rate").value(float(rate), confidence_sequence(round(rate * n), n), n=n)
    return found


class Scores:
    """What examples count in metrics, added one by one; whole examples are held only if a statistic is no mean."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = metrics
        self._places: list[tuple[str, int]] = []  # id and number of each example
        self._units: list[Hashable] = []  # what its unit is known by: its group, or its place
        self._columns = {metric.name: _Column() for metric in metrics}
        self._examples: list[Example] | None = [] if any(metric.statistic is not None for metric in metrics) else None

    def add(self, example: Example) -> None:
        place = example.id, example.number
        self._places.append(place)
        self._units.append(place if example.group is None else unit_of(example))
        for metric in self.metrics:
            self._columns[metric.name].add(metric, example)
        if self._examples is not None:
            self._examples.append(example)

    def values(self, seed: int = 0) -> dict[str, Value]:
        """The values of the metrics that are about any example, whatever the order in which they were added."""
        if not self._places:
            raise TaskError(
                f"no question was answered, so there is nothing to compute {', '.join(map(str, self.metrics))} from."
            )
        order = sorted(range(len(self._places)), key=self._places.__getitem__)
        units = indices_of([self._units[index] for index in order])
        found = ((metric.name, self._value(metric, order, units, seed)) for metric in self.metrics)
        return {name: value for name, value in found if value is not None}

    def _value(self, metric: Metric, order: Sequence[int], units: np.ndarray, seed: int) -> Value | None:
        column = self._columns[metric.name]
        if metric.statistic is not None:
            assert self._examples is not None
            examples = [self._examples[index] for index in order]
            estimate = _estimate(metric, examples, seed)
            pairs = zip(order, examples, strict=True)
            again = [_shared(metric, example) if index in column.shared else example for index, example in pairs]
            other = _estimate(metric, again, seed) if column.shared else None
        else:
            about = ~np.isnan(np.array(column.scores)[order])
            if not about.all():  # units are numbered in the order in which they appear first
                order = [index for index, counts in zip(order, about, strict=True) if counts]
                units = indices_of(units[about].tolist())
            scores = [column.scores[index] for index in order]
            estimate = _mean(metric, scores, units) if order else None
            by_share = [column.shared.get(index, score) for index, score in zip(order, scores, strict=True)]
            other = _mean(metric, by_share, units) if column.shared else None
        if estimate is None:
            return None
        number, interval = estimate
        if interval is not None and other is not None and other[1] is not None:
            # The number is that of lm_eval; the interval holds what it would be if the order of choices did not decide.
            interval = min(interval[0], other[1][0]), max(interval[1], other[1][1])
        return metric.value(number, interval, n=len(order), ties=column.ties)


class _Column:
    """The scores of examples in one metric; nan where it is not about them.

    ties    examples whose likeliest choices are tied
    shared  index of an example whose tie is decided by the order of the choices -> the score that it has if its tie is shared
    """

    def __init__(self) -> None:
        self.scores, self.ties, self.shared = array("d"), 0, dict[int, float]()

    def add(self, metric: Metric, example: Example) -> None:
        score = example.scores.get(metric.name)
        if metric.norm is not None and (score is not None or metric.statistic is not None):
            tied = len(example.likeliest(metric.norm)) > 1
            self.ties += tied
            if tied and example.tie_rule == "first":
                self.shared[len(self.scores)] = _shared(metric, example).scores[metric.name] or 0.0
        self.scores.append(math.nan if score is None else score)


def _shared(metric: Metric, example: Example) -> Example:
    """The example with the score that it has where its tie is shared."""
    shared = structs.replace(example, tie_rule="shared")
    score = None if metric.score is None else _score(metric, shared)
    return structs.replace(shared, scores=shared.scores | {metric.name: score})


def _estimate(metric: Metric, examples: Sequence[Example], seed: int) -> Estimate | None:
    assert metric.statistic is not None
    try:
        estimate = metric.statistic(examples, seed)
        return estimate and (metric.value(*estimate), estimate[1])
    except Exception as error:
        raise TaskError(
            f"the statistic of {metric.name} failed on {len(examples)} answers with {type(error).__name__}: {error}. "
            "Return a finite number with its interval or None; or None for no value."
        ) from error


def _mean(metric: Metric, scores: Sequence[float], units: np.ndarray) -> Estimate:
    """The mean of the scores [n], on the scale of the metric, with its interval over the units, whose indices [n] these are."""
    interval = None
    if metric.interval == "proportion" or (metric.interval and metric.judges and all(0 <= score <= 1 for score in scores)):
        interval = wilson(scores, units.tolist() if units.max() + 1 < len(units) else None)
    elif metric.interval is not None:
        (interval,) = ratio_intervals(np.column_stack([np.bincount(units, weights=scores), np.bincount(units)]), [(0, 1)])
    mean = math.fsum(scores) / len(scores)
    try:
        return metric.scaled(mean), interval and (metric.scaled(interval[0]), metric.scaled(interval[1]))
    except OverflowError as error:
        raise TaskError(f"the mean of {metric.name} is {mean:.6g}: no float holds its exponential.") from error
