"""The summary at the end of a run: models side by side, then a heading for each record, and under it a line for each number."""

from __future__ import annotations

from typing import Any

from pytest_lmeval.report.tables import Comparison, Group, Verdict, comparisons, groups, model_lines, verdicts
from pytest_lmeval.report.words import visible

INDENT, GAP = "    ", "  "


def lines(records: list[dict[str, Any]], *, width: int, sort: str | None = None) -> list[str]:
    """The models, their verdicts, what several of them were measured on, then the other records.

    sort  a metric: of models side by side, those with the best value of it come first

    Metrics are aligned over the whole table, values within a record.
    """
    several = len({record["lm"]["fingerprint"] for record in records}) > 1
    table = [*model_lines(records), "", *_verdict_lines(verdicts(records))]
    side_by_side = comparisons(records, sort)
    table += [line for comparison in side_by_side for line in _comparison_lines(comparison)]
    told = {place for comparison in side_by_side for place in comparison.records}
    shown = groups([record for place, record in enumerate(records) if place not in told])
    first = max((len(row.metric) for group in shown for row in group.rows), default=0)
    for group in shown:
        table += [_short(group.test) or group.subject, INDENT + _about(group, several=several)]
        second = max(len(row.value) for row in group.rows)
        cells = ((row.metric.ljust(first), row.value.rjust(second), row.interval) for row in group.rows)
        table += [INDENT + GAP.join(cell).rstrip() for cell in cells]
    return [_fit(line, width) for line in [*table, ""]]


def _verdict_lines(shown: list[Verdict]) -> list[str]:
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


def _comparison_lines(comparison: Comparison) -> list[str]:
    """A line for each metric and model. The unit comes last, so that a narrow terminal cuts it off first."""
    rows = []
    for name, several in comparison.metrics.items():
        for place, (model, row) in enumerate(zip(comparison.models, several, strict=True)):
            figure, _, unit = row.value.partition(" ")
            rows.append((name if place == 0 else "", model, figure, row.interval, unit))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    failed = [model for model, outcome in zip(comparison.models, comparison.outcomes, strict=True) if outcome == "failed"]
    heading = f"{comparison.kind}, {comparison.subject}" + (f" (failed: {', '.join(failed)})" if failed else "")
    justified = (
        (
            cell.rjust(width) if column == 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [heading, *(INDENT + GAP.join(cells).rstrip() for cells in justified), ""]


def _about(group: Group, *, several: bool) -> str:
    parts = [group.lm if several else "", group.subject, group.verdict, group.how]
    return ", ".join(part for part in parts if part)


def _short(test: str) -> str:
    """The test without the folders of its file."""
    file, colons, name = test.partition("::")
    return file.rpartition("/")[2] + colons + name


def _fit(text: str, width: int) -> str:
    text = visible(text)
    return text if len(text) <= width else text[: width - 3] + "..."
