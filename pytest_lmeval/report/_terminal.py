"""The summary in the terminal: models side by side, then a heading for each other record, and a line for each number of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pytest_lmeval.records._measured import Record
from pytest_lmeval.report._tables import Group, SideBySide, VerdictRow, groups, model_lines, side_by_side, verdicts
from pytest_lmeval.report._words import visible

INDENT, GAP = "    ", "  "


def lines(records: Sequence[Record], *, width: int, sort: str | None = None) -> list[str]:
    """The models, their verdicts, what several of them were measured on, then the other records.

    sort  a metric: of models side by side, those with the best value of it come first

    Metrics are aligned over the whole table, values within a record.
    """
    several = len({record.lm.fingerprint for record in records}) > 1
    table = [*model_lines(records), "", *_verdict_lines(verdicts(records))]
    compared = side_by_side(records, sort)
    table += [line for own in compared for line in _side_by_side_lines(own)]
    told = {index for own in compared for index in own.records}
    shown = groups([record for index, record in enumerate(records) if index not in told])
    first = max((len(row.metric) for group in shown for row in group.rows), default=0)
    for group in shown:
        table += [_short(group.test) or group.subject, INDENT + _about(group, several=several)]
        second = max(len(row.value) for row in group.rows)
        cells = ((row.metric.ljust(first), row.value.rjust(second), row.interval) for row in group.rows)
        table += [INDENT + GAP.join(cell).rstrip() for cell in cells]
    return [_fit(line, width) for line in [*table, ""]]


def _verdict_lines(shown: list[VerdictRow]) -> list[str]:
    if not shown:
        return []
    first, second = max(len(row.lm) for row in shown), max(len(row.verdict) for row in shown)
    return [
        "laws of streaming",
        *(
            INDENT
            + GAP.join(
                (
                    row.lm.ljust(first),
                    row.verdict.ljust(second),
                    f"breaks {row.broken}" if row.broken else f"worst ratio {row.worst_ratio}" if row.worst_ratio else "",
                    f"({row.covered})",
                )
            )
            for row in shown
        ),
        "",
    ]


def _side_by_side_lines(shown: SideBySide) -> list[str]:
    """A line for each metric and model. The unit comes last, so that a narrow terminal cuts it off first."""
    rows = []
    for several in shown.metrics.values():
        for index, (model, row) in enumerate(zip(shown.models, several, strict=True)):
            figure, _, unit = row.value.partition(" ")
            rows.append((row.metric if index == 0 else "", model, figure, row.interval, unit))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    failed = [model for model, outcome in zip(shown.models, shown.outcomes, strict=True) if outcome == "failed"]
    heading = f"{shown.kind}, {shown.subject}" + (f" (failed: {', '.join(failed)})" if failed else "")
    justified = (
        (
            cell.rjust(width) if column == 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [heading, *(INDENT + GAP.join(cells).rstrip() for cells in justified), ""]


def _about(group: Group, *, several: bool) -> str:
    parts = [group.lm if several else "", group.subject, group.verdict, group.notes]
    return ", ".join(part for part in parts if part)


def _short(test: str) -> str:
    """The test without the folders of its file."""
    file, colons, name = test.partition("::")
    return file.rpartition("/")[2] + colons + name


def say(line: str) -> None:
    """Print, whatever the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, errors="backslashreplace").decode(encoding))


def _fit(text: str, width: int) -> str:
    text = visible(text)
    return text if len(text) <= width else text[: width - 3] + "..."
