"""Ask the tasks of a suite and average their first metrics; a failed task leaves no average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from msgspec import convert, structs

from pytest_lmeval.errors import ArgumentError, LmevalError, TaskError, UsageError
from pytest_lmeval.measures._context import current, shared_verb
from pytest_lmeval.measures._merging import check_same
from pytest_lmeval.measures._task import TaskResult, task
from pytest_lmeval.models._identity import facts
from pytest_lmeval.records._measured import Cost, MetricValue, Record, Result, withheld_of
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.tasks import find_suite
from pytest_lmeval.tasks._suite import Average, Suite


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
    keys: dict[str, str] = {}
    for member in asked.tasks:
        known = len(context.log.keys)
        try:
            results[member.name] = task(lm, member, shots, **options)
            if len(context.log.keys) > known:  # no other shard asks it
                keys[member.name] = context.log.keys[-1]
        except UsageError:
            raise
        except LmevalError as error:
            failed[member.name] = str(error)
    whole = context.alone or context.session.share.is_whole
    base = Record(
        test=context.log.test,
        kind="suite",
        subject=asked.name if shots is None and asked.averages is not None else f"{asked.name}, {shots or 0}-shot",
        lm=facts(context.model(lm)),
        settings={"weighted": asked.weighted},
        details={"failed": failed},
    )
    first = {member.name: () if member.score else member.metrics or () for member in asked.tasks}  # a scorer's come first
    if whole:
        record = _with_numbers(base, first, asked.averages, {name: result.record for name, result in results.items()})
        context.log.records.append(record)
        found = SuiteResult(record, results)
    else:
        why = f"its tasks are those of shard {context.session.share} alone; `lmeval merge` averages them"
        averages = None if asked.averages is None else [asdict(one) for one in asked.averages]
        part = {"first": first, "averages": averages, "tasks": keys}
        key = context.key("suite", context.model(lm), {"shots": shots, "weighted": asked.weighted}, [asked.name, *first])
        record = structs.replace(base, not_measured=why)
        found = context.recorded(key, SuiteResult(record, results, part))
    if failed := record.details["failed"]:
        reasons = " ".join(f"[{name}] {why}" for name, why in failed.items())
        what = f"{len(failed)} of the {len(asked.tasks)} tasks of {asked.name} failed, so there is no average"
        raise TaskError(f"{what}: {reasons} The results of the others are kept.")
    return found


def _with_numbers(
    record: Record,
    first: Mapping[str, Sequence[str]],
    averages: Sequence[Average] | None,
    tasks: Mapping[str, Record],
) -> Record:
    """The record of a suite with the metrics of its tasks, and their averages if none has failed.

    first     metrics of each task that its author names; empty: those that it has by default
    averages  those that another harness declares; None: that of the first metric of each task
    tasks     records of the tasks that were asked
    """
    failed, weighted = dict(record.details["failed"]), record.settings["weighted"]
    for name, of_task in tasks.items():
        if withheld := withheld_of(of_task):
            failed[name] = f"its {', '.join(withheld)} was not measured. {next(iter(withheld.values()))}"
    of_tasks = {name: one.metrics for name, one in tasks.items()}
    members = {name: next(iter(names or of_tasks.get(name, ())), "") for name, names in first.items()}
    metrics = {
        name: values[members[name]] for name, values in of_tasks.items() if name not in failed and members[name] in values
    }
    costs = [one.cost for one in tasks.values()]
    return structs.replace(
        record,
        settings={"members": members, "weighted": weighted},
        details={**record.details, "failed": failed},
        notes=[f"failed: {', '.join(failed)}"] if failed else [],
        metrics={**({} if failed else _averages(averages, members, of_tasks, weighted=weighted)), **metrics},
        cost=Cost(seconds=sum(cost.seconds or 0.0 for cost in costs), tokens=sum(cost.tokens or 0 for cost in costs)),
        not_measured=None,
    )


def merged(records: Sequence[Record], part: Mapping[str, Any], tasks: Mapping[str, Record]) -> Record:
    """The record of a suite of which each record is about a share, with what one says it is made of (`SuiteResult.part`), from
    the merged records of its tasks by name."""
    for other in records[1:]:
        check_same(records[0], other)
    failed = {name: why for record in records for name, why in record.details["failed"].items()}
    base = structs.replace(records[0], details={**records[0].details, "failed": failed})
    declared = part["averages"]
    averages = None if declared is None else [convert(one, Average) for one in declared]
    return _with_numbers(base, part["first"], averages, tasks)


@dataclass(frozen=True, repr=False)
class SuiteResult(Result):
    """The results of a suite's tasks, by name, and their average."""

    tasks: dict[str, TaskResult]
    part: dict[str, Any] | None = None  # of a share: how the suite is averaged, and the key of each task in the journal

    def __getitem__(self, name: str) -> TaskResult:
        return self.tasks[name]

    average = MetricValue()
    """Mean of the first metric of each task. A group of lm_eval has the averages that it declares in its record."""


def _averages(
    declared: Sequence[Average] | None, members: dict[str, str], metrics: dict[str, dict[str, Value]], *, weighted: bool
) -> dict[str, Value]:
    """The averages of a suite whose tasks have these metrics: of their first ones (`members`), or those that are declared."""
    if declared is None:
        return {"average": _average([metrics[task][name] for task, name in members.items()], weighted=weighted)}
    found: dict[str, Value] = {}
    for wanted in declared:
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
