"""The tables of models and metrics: one for each kind of measurement, a row for each record, sortable by every column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.report.tables import best_first, headlines, how
from pytest_lmeval.report.words import interval, number

TITLES = {
    "perplexity": "Reading",
    "task": "Tasks",
    "train": "Training",
    "latency": "Latency",
    "throughput": "Throughput",
    "custom": "Own measurements",
}

SCALED = {"bytes", "FLOP"}  # written with a prefix that depends on the value


@dataclass(frozen=True)
class Cell:
    """A number as text, and as what it is sorted by; None where the record has no such metric."""

    text: str
    interval: str
    sort: float | None


@dataclass(frozen=True)
class Row:
    """place  the record's place in the document, which its details are linked by"""

    place: int
    model: str
    subject: str
    test: str
    outcome: str
    note: str
    cells: list[Cell]


@dataclass(frozen=True)
class Grid:
    """columns  names of the metrics
    better   for each, "higher", "lower" or ""
    units    for each, the unit of all its values; "" where they have none, or where each value is written with its own
    """

    title: str
    columns: list[str]
    better: list[str]
    units: list[str]
    rows: list[Row]


def grids(records: Sequence[dict[str, Any]], sort: str | None = None) -> list[Grid]:
    """The records by kind, in the order of `TITLES`; verdicts on laws have a table of their own."""
    by_kind: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for place, record in enumerate(records):
        if record["kind"] != "equivalence":
            by_kind.setdefault(record["kind"], []).append((place, record))
    kinds = [*(kind for kind in TITLES if kind in by_kind), *(kind for kind in by_kind if kind not in TITLES)]
    return [_grid(kind, sorted(by_kind[kind], key=lambda item: best_first(item[1], sort))) for kind in kinds]


def _grid(kind: str, several: list[tuple[int, dict[str, Any]]]) -> Grid:
    names = list(dict.fromkeys(name for _, record in several for name in headlines(record)))
    names.sort(key=lambda name: -sum(name in record["metrics"] for _, record in several))  # what most of them have comes first
    units = [_unit(name, several) for name in names]
    asked = Counter((record["lm"]["spec"], record["subject"]) for _, record in several)
    again = {what for what, count in asked.items() if count > 1}  # only their tests tell these apart
    return Grid(
        title=TITLES.get(kind, kind.capitalize()),
        columns=[name.replace("_", " ") for name in names],
        better=[_better(name, several) for name in names],
        units=units,
        rows=[_row(place, record, dict(zip(names, units, strict=True)), again) for place, record in several],
    )


def _row(place: int, record: dict[str, Any], units: dict[str, str], again: set[tuple[str, str]]) -> Row:
    not_measured = record["settings"].get("not_measured")
    said = [(record["certificate"] or {}).get("verdict", ""), how(record)]
    if (record["lm"]["spec"], record["subject"]) in again:
        said.append(record["test"].rpartition("::")[2].partition("[")[0])
    if not record["metrics"]:
        said.append(f"not measured: {not_measured}" if not_measured else "not measured")
    return Row(
        place=place,
        model=record["lm"]["spec"],
        subject=record["subject"],
        test=record["test"],
        outcome=record["outcome"],
        note=", ".join(filter(None, said)),
        cells=[_cell(record["metrics"].get(name), unit) for name, unit in units.items()],
    )


def _cell(metric: dict[str, Any] | None, unit: str) -> Cell:
    """unit  what the head of the column says already"""
    if metric is None:
        return Cell("", "", None)
    return Cell(number(metric["value"], "" if metric["unit"] == unit else metric["unit"]), interval(metric), metric["value"])


def _unit(name: str, several: list[tuple[int, dict[str, Any]]]) -> str:
    units = {record["metrics"][name]["unit"] for _, record in several if name in record["metrics"]}
    return units.pop() if len(units) == 1 and not units & SCALED else ""


def _better(name: str, several: list[tuple[int, dict[str, Any]]]) -> str:
    directions = {record["metrics"][name]["higher_is_better"] for _, record in several if name in record["metrics"]}
    return {True: "higher", False: "lower"}.get(directions.pop(), "") if len(directions) == 1 else ""
