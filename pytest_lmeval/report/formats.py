"""The numbers in the formats of services that keep them: Bencher, and the action github-action-benchmark.

bencher run --adapter json --file bencher.json            https://bencher.dev/docs/reference/bencher-metric-format
tool: customBiggerIsBetter / customSmallerIsBetter        https://github.com/benchmark-action/github-action-benchmark
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def named_metrics(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """For each metric the benchmark that it belongs to, its name, and itself."""
    for record in document["records"]:
        benchmark = " ".join(filter(None, (record["test"], f"({record['lm']['spec']}, {record['subject']})")))
        for name, metric in record["metrics"].items():
            yield benchmark, name, metric


def bencher(document: dict[str, Any]) -> dict[str, Any]:
    """Bencher Metric Format: {benchmark: {measure: {value, lower_value, upper_value}}}."""
    found: dict[str, Any] = {}
    for benchmark, name, metric in named_metrics(document):
        bounds = {} if metric["low"] is None else {"lower_value": metric["low"], "upper_value": metric["high"]}
        found.setdefault(benchmark, {})[name] = {"value": metric["value"], **bounds}
    return found


def github_action_benchmark(document: dict[str, Any], *, higher_is_better: bool) -> list[dict[str, Any]]:
    """The metrics of one direction: [{name, unit, value, range, extra}]. That action has no place for those of none."""
    return [
        {
            "name": f"{benchmark} {name}",
            "unit": metric["unit"],
            "value": metric["value"],
            **({} if metric["low"] is None else {"range": f"{metric['low']:.6g} to {metric['high']:.6g}"}),
            "extra": f"n = {metric['n']}",
        }
        for benchmark, name, metric in named_metrics(document)
        if metric["higher_is_better"] is higher_is_better
    ]


FORMATS: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "bencher": {"bencher.json": bencher},
    "github-action-benchmark": {
        "customBiggerIsBetter.json": lambda document: github_action_benchmark(document, higher_is_better=True),
        "customSmallerIsBetter.json": lambda document: github_action_benchmark(document, higher_is_better=False),
    },
}
