"""Several tasks and their average, with all of them named: one that failed is never left out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from pytest_lmeval.errors import ArgumentError, LmevalError, TaskError, UsageError
from pytest_lmeval.measures._context import current, verb
from pytest_lmeval.measures._task import TaskResult, task
from pytest_lmeval.models._identity import facts
from pytest_lmeval.records._measured import Cost, ModelFacts, Record, Result
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.tasks import find_suite
from pytest_lmeval.tasks._questions import Suite


@verb
def suite(lm: Any, suite: Suite | str, shots: int = 0, **options: Any) -> SuiteResult:
    """Ask every task of a suite, or of that of this name: the average of their first metrics, all of them named.

    options  keywords of `task`, for every task

    A task that fails does not cost the others: they are recorded, and then it is told, since without it there is no
    average.
    """
    context = current()
    asked = find_suite(suite) if isinstance(suite, str) else suite
    if not isinstance(asked, Suite):
        raise ArgumentError(f"a suite is a Suite, or the name of one; got {asked!r}.")
    results, failed = {}, {}
    for member in asked.tasks:
        try:
            results[member.name] = task(lm, member, shots, **options)
        except UsageError:
            raise
        except LmevalError as error:
            failed[member.name] = str(error)
    record = suite_record(asked, shots, facts(context.model(lm)), results, failed)
    record = structs.replace(record, test=context.log.test)
    context.log.records.append(record)
    refuse_failed(asked, failed)
    return SuiteResult(record, results)


@dataclass(frozen=True, repr=False)
class SuiteResult(Result):
    """What the tasks of a suite came to, by name, and their average."""

    tasks: dict[str, TaskResult]

    def __getitem__(self, name: str) -> TaskResult:
        return self.tasks[name]

    @property
    def average(self) -> Value:
        """Mean of the first metric of each task."""
        return self.record.metrics["average"]


def suite_record(
    suite: Suite, shots: int, lm: ModelFacts, results: Mapping[str, TaskResult], failed: Mapping[str, str]
) -> Record:
    """The record of a suite: every member with its first metric, or with why it failed; an average only if none did."""
    members = [member for member in suite.tasks if member.name in results]
    firsts = {member.name: results[member.name].record.metrics[member.metrics[0]] for member in members}
    costs = [result.record.cost for result in results.values()]
    return Record(
        kind="suite",
        subject=f"{suite.name}, {shots}-shot",
        lm=lm,
        settings={"members": {member.name: member.metrics[0] for member in suite.tasks}, "weighted": suite.weighted},
        details={"failed": dict(failed)},
        notes=[f"failed: {', '.join(failed)}"] if failed else [],
        metrics={**({} if failed else {"average": average(list(firsts.values()), weighted=suite.weighted)}), **firsts},
        cost=Cost(seconds=sum(cost.seconds or 0.0 for cost in costs), tokens=sum(cost.tokens or 0 for cost in costs)),
    )


def average(values: list[Value], *, weighted: bool = False) -> Value:
    """The mean of independent numbers, each weighing the same, or by its n. Its interval is put together from theirs:
    m -+ sqrt(sum of (weight x distance to the bound)^2) (MOVER; Zou and Donner, "Construction of confidence limits about effect
    measures", 2008); None where one of them has none."""
    counts = [float(value.n or 0) if weighted else 1.0 for value in values]
    weights = [count / sum(counts) for count in counts]
    mean = math.fsum(weight * value for weight, value in zip(weights, values, strict=True))
    n = sum(value.n or 0 for value in values)
    if any(value.low is None or value.high is None for value in values):
        return value_of("average", mean, n=n)
    pairs = list(zip(weights, values, strict=True))
    below = math.hypot(*(weight * (value - (value.low or 0.0)) for weight, value in pairs))
    above = math.hypot(*(weight * ((value.high or 0.0) - value) for weight, value in pairs))
    return value_of("average", mean, (mean - below, mean + above), n=n)


def refuse_failed(suite: Suite, failed: Mapping[str, str]) -> None:
    """Raises TaskError where a member failed: what it would have said is not known, and so the average is not."""
    if failed:
        raise TaskError(
            f"{len(failed)} of the {len(suite.tasks)} tasks of {suite.name} failed, so there is no average: {_listed(failed)} "
            "The results of the others are kept."
        )


def _listed(failed: Mapping[str, str]) -> str:
    return " ".join(f"[{name}] {why}" for name, why in failed.items())
