"""Export the numbers of a run in the formats of services that track them: Bencher and github-action-benchmark.

bencher run --adapter json --file bencher.json            https://bencher.dev/docs/reference/bencher-metric-format
tool: customBiggerIsBetter / customSmallerIsBetter        https://github.com/benchmark-action/github-action-benchmark
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_lmeval.records._document import RunDocument
from pytest_lmeval.records._value import Value


def bencher(document: RunDocument) -> dict[str, Any]:
    """Bencher Metric Format: {benchmark: {measure: {value, lower_value, upper_value}}}."""
    found: dict[str, Any] = {}
    for benchmark, name, value in named_values(document):
        bounds = {} if value.interval is None else {"lower_value": value.low, "upper_value": value.high}
        found.setdefault(benchmark, {})[name] = {"value": float(value), **bounds}
    return {"bencher.json": found}


def github_action_benchmark(document: RunDocument) -> dict[str, Any]:
    """A file for each direction: [{name, unit, value, range, extra}]. That action takes no metrics without a direction."""
    files: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for benchmark, name, value in named_values(document):
        if value.higher_is_better is not None:
            bounds = {} if value.interval is None else {"range": f"{value.low:.6g} to {value.high:.6g}"}
            entry = {
                "name": f"{benchmark} {name}",
                "unit": value.unit,
                "value": float(value),
                **bounds,
                "extra": f"n = {value.n}",
            }
            files[value.higher_is_better].append(entry)
    return {"customBiggerIsBetter.json": files[True], "customSmallerIsBetter.json": files[False]}


def named_values(document: RunDocument) -> Iterator[tuple[str, str, Value]]:
    """The benchmark, name and value of each number."""
    for record in document.records:
        benchmark = " ".join(filter(None, (record.test, f"({record.lm.spec}, {record.subject})")))
        for name, value in record.metrics.items():
            yield benchmark, name, value
