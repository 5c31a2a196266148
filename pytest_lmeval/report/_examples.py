"""Build the example tables of the page: question by question, the models side by side.

An answer is marked by its score in the metric of its record that judges answers. The page shortens each text to `SHORT`
characters and embeds `EMBEDDED` characters of questions: those with flips first, then those with wrong answers. It holds the
marks of all questions; the files of examples hold all texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example, Outcome
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import Metric, judge_of, metric
from pytest_lmeval.records._replacing import inside
from pytest_lmeval.report._words import disambiguate, several, visible

SHORT = 1_000
EMBEDDED = 4_000_000
RIGHT, WRONG, PARTLY, UNJUDGED, ABSENT = "1", "0", "~", "-", "."
OUTCOMES: dict[Outcome, str] = {"answered": "a", "cut off": "c", "empty": "e", "refused": "r"}  # as the page's script has them


@dataclass(frozen=True)
class Column:
    """A record of the table, with its metric that judges answers, if it has one."""

    label: str
    file: str
    judge: Metric | None

    def score(self, example: Example) -> float | None:
        """1 for a right answer, 0 for a wrong one; None without a judge."""
        return None if self.judge is None else example.scores.get(self.judge.name)


@dataclass(frozen=True)
class Table:
    """The questions of one subject.

    example   name of one of them
    rows      for each question, column index -> example
    marks     for each column, a character for each question: whether the answer is right
    outcomes  for each column, a character for each question: what became of the answer; empty if none was generated
    """

    subject: str
    example: str
    columns: list[Column]
    rows: list[dict[int, Example]]
    marks: list[str]
    outcomes: list[str]


def example_tables(records: Sequence[Record], folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """A table for each subject with files of examples, as the page's script reads it, and notes on what is not shown.

    folders  output folder of each record, which its file is relative to

    A table has the labels of its `metrics`; a column for each record, whose `marks` and `outcomes` have a character for each
    question; and `rows`, one for each question (see `_row`), or None if it is not embedded.
    """
    by_subject: dict[str, list[tuple[Record, Path]]] = {}
    for record, folder in zip(records, folders, strict=True):
        if (record.examples or "").endswith(".jsonl"):
            by_subject.setdefault(record.subject, []).append((record, folder))
    notes: list[str] = []
    found = [_table(subject, group, notes) for subject, group in by_subject.items()]
    return _embedded([table for table in found if table.rows], notes), notes


def mark(score: float | None) -> str:
    """The mark of an answer with this score."""
    return UNJUDGED if score is None else RIGHT if score >= 1 else WRONG if score <= 0 else PARTLY


def shortened(text: str, *, end: bool = False) -> str:
    """At most `SHORT` characters, the last ones if `end`, and how many there were; control characters are escaped.

    >>> shortened("a" * 5_000)[-40:], shortened("ring\\x07"), shortened("b" * 5_000, end=True)[:40]
    ('.. (the first 1,000 of 5,000 characters)', 'ring\\\\x07', '(the last 1,000 of 5,000 characters) ...')
    """
    if len(text) <= SHORT:
        return visible(text)
    if end:
        return f"(the last {SHORT:,} of {len(text):,} characters) ...{visible(text[-SHORT:])}"
    return f"{visible(text[:SHORT])}... (the first {SHORT:,} of {len(text):,} characters)"


def judge_in(record: Record) -> Metric | None:
    """The first metric of a record that judges its answers: of the task's scorer, or of those that are declared."""
    by_row = (metric(name) for name, judges in record.details.get("scored", {}).items() if judges)
    return next(by_row, None) or judge_of(metric(name, value) for name, value in record.metrics.items())


def _table(subject: str, group: list[tuple[Record, Path]], notes: list[str]) -> Table:
    labels = disambiguate([(record.lm.spec, record.test.rpartition("::")[2]) for record, _ in group])
    columns: list[Column] = []
    questions: dict[tuple[str, int], dict[int, Example]] = {}
    for index, (label, (record, folder)) in enumerate(zip(labels, group, strict=True)):
        columns.append(Column(label, record.examples or "", judge_in(record)))
        seen: Counter[str] = Counter()
        for example in examples_in(folder, record.examples or "", notes):
            questions.setdefault((example.id, seen[example.id]), {})[index] = example
            seen[example.id] += 1
    rows = [*questions.values()]
    marks = [
        "".join(mark(column.score(row[index])) if index in row else ABSENT for row in rows)
        for index, column in enumerate(columns)
    ]
    outcomes = [
        "".join(OUTCOMES.get(row[index].outcome, ABSENT) if index in row else ABSENT for row in rows)
        for index, _ in enumerate(columns)
    ]
    told = [own if own.strip(ABSENT) else "" for own in outcomes]
    return Table(subject, group[0][0].example, columns, rows, marks, told)


def examples_in(folder: Path, name: str, notes: list[str]) -> Iterator[Example]:
    """Yield the examples of a file inside of the output folder; note what cannot be read."""
    total, broken = 0, 0
    try:
        with open(inside(folder, name), "rb") as lines:
            for line in filter(bytes.strip, lines):
                total += 1
                try:
                    yield schema.convert(schema.parse(line, "", ""), Example)
                except (ValueError, RecursionError):
                    broken += 1
    except OSError as error:
        notes.append(f"the examples of {name} are not shown: {error.strerror or error}")
    if broken:
        notes.append(f"{broken} of {total} lines of {name} cannot be read and are not shown")


def _embedded(tables: list[Table], notes: list[str]) -> list[dict[str, Any]]:
    """The tables as plain data, with as many of their rows as `EMBEDDED` allows."""
    order = sorted(
        (_rank(table, index), index, number) for number, table in enumerate(tables) for index in range(len(table.rows))
    )
    metrics = [  # that are about any of the questions
        list(dict.fromkeys(name for row in table.rows for one in row.values() for name in _told(one))) for table in tables
    ]
    rows: list[list[Any]] = [[None] * len(table.rows) for table in tables]
    left = EMBEDDED
    for _, index, number in order:
        row = _row(tables[number], index, metrics[number])
        left -= len(json.dumps(row, separators=(",", ":")))
        if left < 0:
            break
        rows[number][index] = row
    found = []
    for table, names, shown in zip(tables, metrics, rows, strict=True):
        if None in shown:
            files = ", ".join(column.file for column in table.columns)
            notes.append(
                f"{table.subject}: the texts of {len(shown) - shown.count(None):,} of {several(len(shown), table.example)} are "
                f"in this page, flips and wrong answers first; all are in {files}"
            )
        columns = [
            {"label": column.label, "file": column.file, "marks": marks, "outcomes": outcomes}
            for column, marks, outcomes in zip(table.columns, table.marks, table.outcomes, strict=True)
        ]
        labels = [metric(name).label for name in names]
        found.append({"subject": table.subject, "example": table.example, "metrics": labels, "columns": columns, "rows": shown})
    return found


def _told(example: Example) -> list[str]:
    """The metrics that say something of an example."""
    return [name for name, score in example.scores.items() if score is not None]


def _rank(table: Table, index: int) -> int:
    """0 for a flip (right and wrong answers), 1 for other questions with a wrong answer, 2 for the rest."""
    marks = {own[index] for own in table.marks}
    return 0 if {RIGHT, WRONG} <= marks else 1 if marks & {WRONG, PARTLY} else 2


def _row(table: Table, index: int, metrics: list[str]) -> list[Any]:
    """A question: number, id, group, choices, right choices, target; then for each column its prompt (None if it is the first
    one's), answer (an index if there are choices), log-likelihoods, scores, the score that marks it, and thought.
    """
    row = table.rows[index]
    first = next(iter(row.values()))
    choices = [shortened(choice) for choice in first.choices]
    target = "" if choices else shortened(first.target or "")
    own: list[list[Any]] = [[None] * len(table.columns) for _ in range(6)]
    for number, one in row.items():
        values = (
            shortened(one.prompt, end=True) if one is first or one.prompt != first.prompt else None,
            one.chosen if choices and one.chosen is not None else shortened(one.output),
            [round(value, 3) for value in one.loglikelihoods] if choices else None,
            [_digits(one.scores.get(name)) for name in metrics],
            _digits(table.columns[number].score(one)),
            shortened(one.thought),
        )
        for column, value in zip(own, values, strict=True):
            column[number] = value
    return [first.number, first.id, first.group, choices, list(first.right), target, *own]


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
