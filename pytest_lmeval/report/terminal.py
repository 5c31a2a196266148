"""The summary at the end of a run: a heading for each record, and under it a line for each number."""

from __future__ import annotations

from typing import Any

from pytest_lmeval.report.tables import Group, groups, model_line

INDENT, GAP = "    ", "  "


def lines(records: list[dict[str, Any]], *, width: int) -> list[str]:
    """The models, then the records; metrics are aligned over the whole table, values within a record."""
    models = {record["lm"]["fingerprint"]: model_line(record["lm"]) for record in records}
    shown = groups(records)
    first = max(len(row.metric) for group in shown for row in group.rows)
    table = []
    for group in shown:
        table += [_short(group.test) or group.subject, INDENT + _about(group, several=len(models) > 1)]
        second = max(len(row.value) for row in group.rows)
        cells = ((row.metric.ljust(first), row.value.rjust(second), row.interval) for row in group.rows)
        table += [INDENT + GAP.join(cell).rstrip() for cell in cells]
    return [_fit(line, width) for line in [*models.values(), "", *table, ""]]


def _about(group: Group, *, several: bool) -> str:
    parts = [group.lm if several else "", group.subject, group.verdict, group.how]
    return ", ".join(part for part in parts if part)


def _short(test: str) -> str:
    """The test without the folders of its file."""
    file, colons, name = test.partition("::")
    return file.rpartition("/")[2] + colons + name


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
