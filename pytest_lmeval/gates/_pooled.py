"""Make one entry of a baseline from several runs: all answers to a question are kept, so that their spread is known.

A server that does not repeat itself, even at temperature 0, shows only from run to run how much chance changes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from msgspec import structs

from pytest_lmeval.errors import BaselineError
from pytest_lmeval.gates._entry import Entry, differs
from pytest_lmeval.gates._scores import Scores, numbered, question_of, rounded
from pytest_lmeval.records._metric import Metric, metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.statistics._drawn import between_runs
from pytest_lmeval.statistics._estimate import group_sums, ratio_intervals
from pytest_lmeval.statistics._proportion import wilson

Run = tuple[Entry, Scores | None]


def pooled(runs: Sequence[Run], where: str) -> Run:
    """The entry and the scores of one record of all runs.

    Each answer counts, whichever run gave it. Only answers are pooled: of what was measured otherwise (texts, costs, statistics
    that are no means), the first run stands. A run whose answers count the same as those of an earlier one, one by one, is left
    out: it was drawn with the same random numbers, and says nothing about chance.

    Raises BaselineError if the runs measured different things; `where` names the record.
    """
    (entry, scores), *others = runs
    for other, _ in others:
        ours, theirs = (structs.replace(one, settings={**one.settings, "seed": None}) for one in (entry, other))
        if apart := differs(ours, theirs):
            raise BaselineError(
                f"{where} was measured in different ways: {', '.join(apart)}. Runs are pooled to see what chance changes, so "
                "nothing else may differ but the seed. Leave one of them out of --from."
            )
    if scores is None or not any(name in entry.metrics for name in scores.columns):
        return entry, scores
    different = _different([found for _, found in runs if found is not None])
    if len(different) < 2:
        return entry, scores
    together = _together(different)
    metrics, spread = dict(entry.metrics), {}
    for name in set(together.columns) & set(metrics):
        metrics[name] = _mean(metrics[name], metric(name, metrics[name]), together, name)
        if (deviation := between_runs([*(together.by_question(name) or {}).values()])) is not None:
            spread[name] = float(rounded(metric(name, metrics[name]).scale * deviation))
    repeats = len(together.ids) / len({question_of(example) for example in together.ids})
    settings = {**entry.settings, "repeats": rounded(repeats)}
    return structs.replace(entry, metrics=metrics, settings=settings, between_runs=spread), together


def _different(runs: Sequence[Scores]) -> list[Scores]:
    """The runs without those whose answers count the same as in one before."""
    found: dict[str, Scores] = {}
    for run in runs:
        found.setdefault(run.checksum, run)
    return [*found.values()]


def _together(runs: Sequence[Scores]) -> Scores:
    """All answers of all runs, those to one question side by side and, if it shares nothing with other questions, a group."""
    names = [name for name in runs[0].columns if all(name in run.columns for run in runs)]
    rows: dict[str, list[tuple[str | None, list[float | None]]]] = {}
    for run in runs:
        for index, (example, group) in enumerate(zip(run.ids, run.groups, strict=True)):
            rows.setdefault(question_of(example), []).append((group, [run.columns[name][index] for name in names]))
    flat = [(question, group, values) for question, answers in rows.items() for group, values in answers]
    groups = [group or hashlib.sha256(question.encode()).hexdigest()[:8] for question, group, _ in flat]
    columns = {name: [values[index] for _, _, values in flat] for index, name in enumerate(names)}
    return Scores(numbered([question for question, _, _ in flat]), list(groups), columns)


def _mean(old: Value, declared: Metric, scores: Scores, name: str) -> Value:
    """The metric over all answers, with the interval of questions, each of which is one unit."""
    pairs = [pair for pair in zip(scores.columns[name], scores.groups, strict=True) if pair[0] is not None]
    values, groups = [value or 0.0 for value, _ in pairs], [group for _, group in pairs]
    mean = math.fsum(values) / len(values)
    if all(0 <= value <= 1 for value in values):
        interval = wilson(values, groups)
    else:
        sums = group_sums(np.column_stack([values, np.ones(len(values))]), groups)
        (interval,) = ratio_intervals(sums, [(0, 1)])
    low, high = (None, None) if interval is None else (rounded(declared.scaled(end)) for end in interval)
    value = rounded(declared.scaled(mean))
    low, high = (None, None) if low is None or high is None else (min(low, value), max(high, value))
    return Value(value, old.unit, low=low, high=high, n=len(values), higher_is_better=old.higher_is_better)
