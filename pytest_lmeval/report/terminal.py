"""The summary at the end of a run: a heading for each record, and under it a line for each number."""

from __future__ import annotations

from typing import Any

from pytest_lmeval.report.tables import Group, Verdict, groups, model_lines, verdicts

INDENT, GAP = "    ", "  "


def lines(records: list[dict[str, Any]], *, width: int) -> list[str]:
    """The models, their verdicts, then the other records; metrics are aligned over the whole table, values within a record."""
    several = len({record["lm"]["fingerprint"] for record in records}) > 1
    table = [*model_lines(records), "", *_verdict_lines(verdicts(records))]
    shown = groups(records)
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


def _about(group: Group, *, several: bool) -> str:
    parts = [group.lm if several else "", group.subject, group.verdict, group.how]
    return ", ".join(part for part in parts if part)


def _short(test: str) -> str:
    """The test without the folders of its file."""
    file, colons, name = test.partition("::")
    return file.rpartition("/")[2] + colons + name


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
