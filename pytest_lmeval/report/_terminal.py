"""Format the summary for the terminal: models, verdicts, models side by side, then each other record with its numbers."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from pytest_lmeval.records._measured import Record
from pytest_lmeval.report._tables import SideBySide, VerdictRow, groups, model_lines, side_by_side, verdicts
from pytest_lmeval.report._words import one_line, safe_lines

INDENT, GAP = "    ", "  "


class Whole(str):
    """A line that says what a verdict covers: it is wrapped where others are cut off."""

    def wrapped(self, width: int) -> list[str]:
        return textwrap.wrap(one_line(self), width, subsequent_indent=INDENT * 2, break_on_hyphens=False)


def lines(records: Sequence[Record], *, width: int, sort: str | None = None) -> list[str]:
    """The summary as lines of at most `width` characters.

    sort  a metric: of models side by side, those with its best value come first
    """
    many_models = len({record.lm.fingerprint for record in records}) > 1
    table = [*model_lines(records), "", *_verdict_lines(verdicts(records))]
    compared = side_by_side(records, sort)
    table += [line for own in compared for line in _side_by_side_lines(own)]
    shown = {index for own in compared for index in own.indices}
    rest = groups([record for index, record in enumerate(records) if index not in shown])
    first = max((len(row.metric) for group in rest for row in group.rows), default=0)
    for group in rest:
        record = group.record
        about = Whole(INDENT + ", ".join(filter(None, (record.lm.spec if many_models else "", record.subject, group.notes))))
        file, colons, name = record.test.partition("::")
        table += [file.rpartition("/")[2] + colons + name or record.subject, about]
        second = max(len(row.value) for row in group.rows)
        cells = ((row.metric.ljust(first), row.value.rjust(second), row.interval) for row in group.rows)
        table += [INDENT + GAP.join(cell).rstrip() for cell in cells]
    return [fitting for line in [*table, ""] for fitting in _fit(line, width)]


def _fit(line: str, width: int) -> list[str]:
    shown = one_line(line)
    if len(shown) <= width:
        return [shown]
    return line.wrapped(width) if isinstance(line, Whole) else [shown[: width - 3] + "..."]


def _verdict_lines(shown: list[VerdictRow]) -> list[str]:
    first = max((len(row.record.lm.spec) for row in shown), default=0)
    table: list[str] = []
    for row in shown:
        ratio = f"worst ratio {row.worst_ratio}" if row.worst_ratio else ""
        found = (row.verdict, row.coverage, f"breaks {row.broken}" if row.broken else ratio)
        table.append(Whole(INDENT + row.record.lm.spec.ljust(first) + GAP + ", ".join(filter(None, found))))
    return ["laws of streaming", *table, ""] if table else []


def _side_by_side_lines(shown: SideBySide) -> list[str]:
    """A line for each metric and model. The unit comes last, so that a narrow terminal cuts it off first."""
    rows = []
    for values in shown.metrics.values():
        for index, (model, row) in enumerate(zip(shown.models, values, strict=True)):
            figure, _, unit = row.value.partition(" ")
            rows.append((row.metric if index == 0 else "", model, figure, row.interval, unit))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    failed = [model for model, outcome in zip(shown.models, shown.outcomes, strict=True) if outcome == "failed"]
    table = [f"{shown.kind}, {shown.subject}" + (f" (failed: {', '.join(failed)})" if failed else "")]
    for own in rows:
        cells = [cell.ljust(width) for cell, width in zip(own, widths, strict=True)]
        cells[2] = own[2].rjust(widths[2])
        line = INDENT + GAP.join(cells).rstrip()
        table.append(Whole(line) if own[0] == "verdict" else line)
    return [*table, ""]


def say(line: str) -> None:
    """Print with any encoding of the terminal, each line as `one_line`."""
    encoding = sys.stdout.encoding or "utf-8"
    print(safe_lines(line).encode(encoding, errors="backslashreplace").decode(encoding))
