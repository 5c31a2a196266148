"""Several tasks and their average, with all of them named: one that failed is never left out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.errors import TaskError
from pytest_lmeval.measures._task import TaskResult
from pytest_lmeval.records.record import Record
from pytest_lmeval.records.value import Metric
from pytest_lmeval.tasks.questions import Suite


@dataclass(frozen=True, repr=False)
class SuiteResult:
    """What the tasks of a suite came to, by name, and their average."""

    record: Record
    tasks: dict[str, TaskResult]

    def __repr__(self) -> str:
        return repr(self.record)

    def __getitem__(self, name: str) -> TaskResult:
        return self.tasks[name]

    @property
    def average(self) -> Metric:
        """Mean of the first metric of each task."""
        return self.record.metrics["average"]


def suite_record(
    suite: Suite, shots: int, lm: dict[str, Any], results: Mapping[str, TaskResult], failed: Mapping[str, str]
) -> Record:
    """The record of a suite: every member with its first metric, or with why it failed; an average only if none did."""
    firsts = {task.name: results[task.name].record.metrics[task.metrics[0]] for task in suite.tasks if task.name in results}
    costs = [result.record.cost for result in results.values()]
    return Record(
        kind="suite",
        subject=f"{suite.name}, {shots}-shot",
        lm=lm,
        settings={
            "members": {task.name: task.metrics[0] if task.name in firsts else "failed" for task in suite.tasks},
            "failed": dict(failed),
            "weighted": suite.weighted,
        },
        metrics={**({} if failed else {"average": average(list(firsts.values()), weighted=suite.weighted)}), **firsts},
        cost={name: sum(cost[name] for cost in costs) for name in ("seconds", "tokens")},
    )


def average(values: list[Metric], *, weighted: bool = False) -> Metric:
    """The mean of independent numbers, each weighing the same, or by its n. Its interval is put together from theirs:
    m -+ sqrt(sum of (weight x distance to the bound)^2) (MOVER; Zou and Donner, "Construction of confidence limits about effect
    measures", 2008); None where one of them has none."""
    counts = [float(value.n or 0) if weighted else 1.0 for value in values]
    weights = [count / sum(counts) for count in counts]
    mean = math.fsum(weight * value for weight, value in zip(weights, values, strict=True))
    n = sum(value.n or 0 for value in values)
    if any(value.low is None or value.high is None for value in values):
        return Metric(mean, n=n, higher_is_better=True)
    pairs = list(zip(weights, values, strict=True))
    below = math.hypot(*(weight * (value - (value.low or 0.0)) for weight, value in pairs))
    above = math.hypot(*(weight * ((value.high or 0.0) - value) for weight, value in pairs))
    return Metric(mean, low=mean - below, high=mean + above, n=n, higher_is_better=True)


def refuse_failed(suite: Suite, failed: Mapping[str, str]) -> None:
    """Raises TaskError where a member failed: what it would have said is not known, and so the average is not."""
    if failed:
        raise TaskError(
            f"{len(failed)} of the {len(suite.tasks)} tasks of {suite.name} failed, so there is no average: {_listed(failed)} "
            "The results of the others are kept."
        )


def _listed(failed: Mapping[str, str]) -> str:
    return " ".join(f"[{name}] {why}" for name, why in failed.items())
