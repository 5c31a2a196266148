"""The summary at the end of a run: a heading for each record, and under it a line for each number."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from pytest_lmeval.report.tables import Row, model_line, rows

INDENT, GAP = "    ", "  "


def lines(records: list[dict[str, Any]], *, width: int) -> list[str]:
    """The models, then the records; columns are aligned over the whole table, and no line is longer than `width`."""
    models = {record["lm"]["fingerprint"]: model_line(record["lm"]) for record in records}
    shown = list(rows(records))
    cells = {id(row): (row.metric, row.value, row.interval) for row in shown}
    sizes = [max(len(row[column]) for row in cells.values()) for column in range(3)]
    table = []
    for heading, group in groupby(shown, key=lambda row: _heading(row, several=len(models) > 1)):
        table.append(heading)
        for row in group:
            metric, value, interval = cells[id(row)]
            table.append(INDENT + GAP.join((metric.ljust(sizes[0]), value.rjust(sizes[1]), interval)).rstrip())
    return [_fit(line, width) for line in [*models.values(), "", *table, ""]]


def _heading(row: Row, *, several: bool) -> str:
    parts = [row.test.rpartition("/")[2], row.lm if several else "", row.subject, row.verdict]
    return ", ".join(part for part in parts if part)


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
