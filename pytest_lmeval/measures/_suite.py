"""Ask the tasks of a suite and average their first metrics; a failed task leaves no average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.errors import ArgumentError, LmevalError, TaskError, UsageError
from pytest_lmeval.measures._context import current, shared_verb
from pytest_lmeval.measures._task import TaskResult, task
from pytest_lmeval.models._identity import facts
from pytest_lmeval.records._measured import Cost, MetricValue, Record, Result, withheld_of
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.tasks import find_suite
from pytest_lmeval.tasks._suite import Suite


@shared_verb
def suite(lm: Any, suite: Suite | str, shots: int | None = None, **options: Any) -> SuiteResult:
    """Ask every task of a suite, or of the suite of this name; `options` are keywords of `task`.

    Raises TaskError if a task failed, after the others are asked and recorded: without it there is no average.
    """
    context = current()
    asked = find_suite(suite) if isinstance(suite, str) else suite
    if not isinstance(asked, Suite):
        raise ArgumentError(f"a suite is a Suite, or the name of one; got {asked!r}.")
    results: dict[str, TaskResult] = {}
    failed: dict[str, str] = {}
    for member in asked.tasks:
        try:
            results[member.name] = task(lm, member, shots, **options)
        except UsageError:
            raise
        except LmevalError as error:
            failed[member.name] = str(error)
    for name, result in results.items():
        if withheld := withheld_of(result.record):
            failed[name] = f"its {', '.join(withheld)} was not measured. {next(iter(withheld.values()))}"
    names = {name: tuple(result.record.metrics) for name, result in results.items()}  # of a task by default
    first = {member.name: () if member.score else member.metrics for member in asked.tasks}  # those of a scorer come first
    members = {name: next(iter(metrics or names.get(name, ())), "") for name, metrics in first.items()}
    metrics = {
        name: result.record.metrics[members[name]] for name, result in results.items() if name not in failed and members[name]
    }
    of_tasks = {name: result.record.metrics for name, result in results.items()}
    averages = {} if failed else _averages(asked, members, of_tasks)
    costs = [result.record.cost for result in results.values()]
    record = Record(
        test=context.log.test,
        kind="suite",
        subject=asked.name if shots is None and asked.averages is not None else f"{asked.name}, {shots or 0}-shot",
        lm=facts(context.model(lm)),
        settings={"members": members, "weighted": asked.weighted},
        details={"failed": failed},
        notes=[f"failed: {', '.join(failed)}"] if failed else [],
        metrics={**averages, **metrics},
        cost=Cost(seconds=sum(cost.seconds or 0.0 for cost in costs), tokens=sum(cost.tokens or 0 for cost in costs)),
    )
    context.log.records.append(record)
    if failed:
        reasons = " ".join(f"[{name}] {why}" for name, why in failed.items())
        what = f"{len(failed)} of the {len(asked.tasks)} tasks of {asked.name} failed, so there is no average"
        raise TaskError(f"{what}: {reasons} The results of the others are kept.")
    return SuiteResult(record, results)


@dataclass(frozen=True, repr=False)
class SuiteResult(Result):
    """The results of a suite's tasks, by name, and their average."""

    tasks: dict[str, TaskResult]

    def __getitem__(self, name: str) -> TaskResult:
        return self.tasks[name]

    average = MetricValue()
    """Mean of the first metric of each task. A group of lm_eval has the averages that it declares in its record."""


def _averages(asked: Suite, members: dict[str, str], metrics: dict[str, dict[str, Value]]) -> dict[str, Value]:
    """The averages of a suite whose tasks have these metrics: of their first ones (`members`), or those that it declares."""
    if asked.averages is None:
        return {"average": _average([metrics[task][name] for task, name in members.items()], weighted=asked.weighted)}
    found: dict[str, Value] = {}
    for wanted in asked.averages:
        of_tasks = [metrics[task] for task in wanted.tasks]
        for name in dict.fromkeys(name for of_task in of_tasks for name in of_task):
            metric, _, of_filter = name.partition(",")
            if metric == wanted.metric and (wanted.filters is None or (of_filter or "none") in wanted.filters):
                values = [of_task[name] for of_task in of_tasks if name in of_task]
                title = f"{wanted.within} {name}" if wanted.within else name
                found[title] = _average(values, weighted=wanted.weighted)
    return found


def _average(values: list[Value], *, weighted: bool) -> Value:
    """The mean of independent numbers, each of the same weight, or of the weight n.

    Interval: m -+ sqrt(sum of (weight x distance to the bound)^2) (MOVER; Zou and Donner 2008), if all numbers have one.
    """
    counts = [float(value.n or 0) if weighted else 1.0 for value in values]
    pairs = [(count / sum(counts), value) for count, value in zip(counts, values, strict=True)]
    mean = math.fsum(weight * value for weight, value in pairs)
    interval = None
    if all(value.interval for value in values):
        below = math.hypot(*(weight * (value - value.low) for weight, value in pairs))
        above = math.hypot(*(weight * (value.high - value) for weight, value in pairs))
        interval = (mean - below, mean + above)
    n, ties = sum(value.n or 0 for value in values), sum(value.ties for value in values)
    return value_of("average", mean, interval, n=n, ties=ties)
