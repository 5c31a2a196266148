"""The tables of models and metrics: one for each kind of measurement, a row for each record, sortable by every column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.report._tables import best_first, headlines
from pytest_lmeval.report._words import interval, number

SCALED = {"bytes", "FLOP"}  # written with a prefix that depends on the value


@dataclass(frozen=True)
class Cell:
    """A number as text, and as what it is sorted by; None where the record has no such metric."""

    text: str
    interval: str
    sort: float | None


@dataclass(frozen=True)
class Row:
    """index  the record's in the document, by which its details are linked"""

    index: int
    model: str
    subject: str
    test: str
    outcome: str
    note: str
    cells: list[Cell]


@dataclass(frozen=True)
class Grid:
    """columns  what the metrics are called
    better   for each, "higher", "lower" or ""
    units    for each, the unit of all its values; "" where they have none, or where each value is written with its own
    """

    title: str
    columns: list[str]
    better: list[str]
    units: list[str]
    rows: list[Row]


def grids(records: Sequence[Record], sort: str | None = None) -> list[Grid]:
    """The records by kind; verdicts on laws have a table of their own."""
    by_kind: dict[str, list[tuple[int, Record]]] = {}
    for index, record in enumerate(records):
        if not record.is_verdict:
            by_kind.setdefault(record.kind, []).append((index, record))
    return [_grid(kind, sorted(several, key=lambda item: best_first(item[1], sort))) for kind, several in by_kind.items()]


def _grid(kind: str, several: list[tuple[int, Record]]) -> Grid:
    columns: dict[str, list[Value]] = {}
    for name in dict.fromkeys(name for _, record in several for name in headlines(record)):
        columns[name] = [record.metrics[name] for _, record in several if name in record.metrics]
    columns = dict(sorted(columns.items(), key=lambda column: -len(column[1])))  # what most of them have comes first
    units = {name: _unit(values) for name, values in columns.items()}
    asked = Counter((record.lm.spec, record.subject) for _, record in several)
    repeated = {what for what, count in asked.items() if count > 1}  # only their tests tell these apart
    return Grid(
        title=kind.replace("_", " ").capitalize(),
        columns=[metric(name, values[0]).label for name, values in columns.items()],
        better=[_better(values) for values in columns.values()],
        units=list(units.values()),
        rows=[_row(index, record, units, repeated) for index, record in several],
    )


def _row(index: int, record: Record, units: dict[str, str], repeated: set[tuple[str, str]]) -> Row:
    said = [record.certificate.verdict if record.certificate else "", *record.notes]
    if (record.lm.spec, record.subject) in repeated:
        said.append(record.test.rpartition("::")[2].partition("[")[0])
    if not record.metrics:
        said.append(f"not measured: {record.not_measured}" if record.not_measured else "not measured")
    return Row(
        index=index,
        model=record.lm.spec,
        subject=record.subject,
        test=record.test,
        outcome=record.outcome,
        note=", ".join(filter(None, said)),
        cells=[_cell(record.metrics.get(name), unit) for name, unit in units.items()],
    )


def _cell(value: Value | None, unit: str) -> Cell:
    """unit  what the head of the column says already"""
    if value is None:
        return Cell("", "", None)
    return Cell(number(value, "" if value.unit == unit else value.unit), interval(value), float(value))


def _unit(values: list[Value]) -> str:
    units = {value.unit for value in values}
    return units.pop() if len(units) == 1 and not units & SCALED else ""


def _better(values: list[Value]) -> str:
    directions = {value.higher_is_better for value in values}
    return "higher" if directions == {True} else "lower" if directions == {False} else ""
