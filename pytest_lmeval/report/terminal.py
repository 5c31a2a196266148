"""The summary at the end of a run: a heading for each record, and under it a line for each number."""

from __future__ import annotations

from typing import Any

from pytest_lmeval.report.tables import Group, groups, model_line

INDENT, GAP = "    ", "  "


def lines(records: list[dict[str, Any]], *, width: int) -> list[str]:
    """The models, then the records; columns are aligned over the whole table, and no line is longer than `width`."""
    models = {record["lm"]["fingerprint"]: model_line(record["lm"]) for record in records}
    shown = groups(records)
    rows = [row for group in shown for row in group.rows]
    first, second = (max(len(text) for text in column) for column in zip(*((r.metric, r.value) for r in rows), strict=True))
    table = []
    for group in shown:
        table += [_short(group.test) or group.subject, INDENT + _about(group, several=len(models) > 1)]
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
