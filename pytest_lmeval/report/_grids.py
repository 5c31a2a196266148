"""Build the tables of models by metrics: one for each kind of record, a row for each record, sortable by every column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.report._tables import best_first, headlines, notes_of
from pytest_lmeval.report._words import interval, number

SCALED = {"bytes", "FLOP"}  # units whose prefix depends on the value


@dataclass(frozen=True)
class Cell:
    """A number as text and as its sort key; None if the record lacks the metric."""

    text: str
    interval: str
    sort: float | None


@dataclass(frozen=True)
class Row:
    """A record, and its index in the document, which its details are linked by."""

    index: int
    record: Record
    note: str
    cells: list[Cell]


@dataclass(frozen=True)
class Grid:
    """columns  labels of the metrics
    better   for each, "higher", "lower" or ""
    units    for each, the unit of all its values; "" if they have none or each value is shown with its own
    """

    title: str
    columns: list[str]
    better: list[str]
    units: list[str]
    rows: list[Row]


def grids(records: Sequence[Record], sort: str | None = None) -> list[Grid]:
    """The records by kind, without verdicts on laws, which have their own table."""
    by_kind: dict[str, list[tuple[int, Record]]] = {}
    for index, record in enumerate(records):
        if not record.is_verdict:
            by_kind.setdefault(record.kind, []).append((index, record))
    return [_grid(kind, sorted(group, key=lambda item: best_first(item[1], sort))) for kind, group in by_kind.items()]


def _grid(kind: str, group: list[tuple[int, Record]]) -> Grid:
    columns: dict[str, list[Value]] = {}
    for name in dict.fromkeys(name for _, record in group for name in headlines(record)):
        columns[name] = [record.metrics[name] for _, record in group if name in record.metrics]
    columns = dict(sorted(columns.items(), key=lambda column: -len(column[1])))  # metrics of most records first
    units = {name: _unit(values) for name, values in columns.items()}
    measured = Counter((record.lm.spec, record.subject) for _, record in group)
    repeated = {what for what, count in measured.items() if count > 1}  # only the test names distinguish these
    return Grid(
        title=kind.replace("_", " ").capitalize(),
        columns=[metric(name, values[0]).label for name, values in columns.items()],
        better=[_better(values) for values in columns.values()],
        units=list(units.values()),
        rows=[_row(index, record, units, (record.lm.spec, record.subject) in repeated) for index, record in group],
    )


def _row(index: int, record: Record, units: dict[str, str], with_test: bool) -> Row:
    notes = notes_of(record)
    if with_test:
        notes.append(record.test.rpartition("::")[2].partition("[")[0])
    if not record.metrics:
        notes.append(f"not measured: {record.not_measured}" if record.not_measured else "not measured")
    cells = [_cell(record.metrics.get(name), unit) for name, unit in units.items()]
    return Row(index, record, ", ".join(filter(None, notes)), cells)


def _cell(value: Value | None, unit: str) -> Cell:
    """unit  unit in the head of the column"""
    if value is None:
        return Cell("", "", None)
    return Cell(number(value, "" if value.unit == unit else value.unit), interval(value), float(value))


def _unit(values: list[Value]) -> str:
    units = {value.unit for value in values}
    return units.pop() if len(units) == 1 and not units & SCALED else ""


def _better(values: list[Value]) -> str:
    directions = {value.higher_is_better for value in values}
    return "higher" if directions == {True} else "lower" if directions == {False} else ""
