"""The answered questions of a run as the page shows them: question by question, the models side by side.

Nothing is judged here: the mark of an answer is its score by the metric of its record that judges answers. What a page embeds
is bounded, and what is left out is said: a text is shortened to `SHORT` characters, and of very many questions those with flips
come first, then the wrong ones, until `EMBEDDED` characters are used. The marks of all of them are there. Everything in full
stands in the files of examples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import Metric, judge_of, metric
from pytest_lmeval.report._words import disambiguate, several, visible

SHORT = 1_000
EMBEDDED = 4_000_000
RIGHT, WRONG, PARTLY, UNJUDGED, ABSENT = "1", "0", "~", "-", "."


@dataclass(frozen=True)
class Column:
    """A record of the table. `judge`: the metric of it that judges answers, if one does."""

    label: str
    file: str
    judge: Metric | None

    def score(self, example: Example) -> float | None:
        """1 if the answer is right, 0 if it is wrong; None if nothing says so."""
        return None if self.judge is None else example.scores.get(self.judge.name)


@dataclass(frozen=True)
class Table:
    """The questions of one subject.

    example  what one of them is called
    rows     for each question the examples of the columns that asked it, by their index
    marks    for each column a character for each question
    """

    subject: str
    example: str
    columns: list[Column]
    rows: list[dict[int, Example]]
    marks: list[str]


def example_tables(records: Sequence[Record], folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """A table for each subject with files of examples, as the page's script reads it, and notes on what is not shown.

    folders  for each record, the output folder that its file is relative to

    A table has the names of its `metrics`; a column for each record, whose `marks` has a character for each question; and
    `rows`: for each question what `_row` makes of it, or None where it is not embedded.
    """
    by_subject: dict[str, list[tuple[Record, Path]]] = {}
    for record, folder in zip(records, folders, strict=True):
        if (record.examples or "").endswith(".jsonl"):
            by_subject.setdefault(record.subject, []).append((record, folder))
    notes: list[str] = []
    found = [_table(subject, asked, notes) for subject, asked in by_subject.items()]
    return _embedded([table for table in found if table.rows], notes), notes


def read(file: Path) -> Iterator[Example | None]:
    """The examples of a file; None for a line that is none. Raises OSError."""
    with open(file, "rb") as lines:
        for line in filter(bytes.strip, lines):
            try:
                yield schema.convert(schema.parse(line, "", ""), Example)
            except (ValueError, RecursionError):
                yield None


def mark(score: float | None) -> str:
    """How an answer with this score is marked."""
    return UNJUDGED if score is None else RIGHT if score >= 1 else WRONG if score <= 0 else PARTLY


def shortened(text: str, *, end: bool = False) -> str:
    """At most `SHORT` characters of it, the last ones if `end`, and how many there were; control characters written out.

    >>> shortened("a" * 5_000)[-40:], shortened("ring\\x07"), shortened("b" * 5_000, end=True)[:40]
    ('.. (the first 1,000 of 5,000 characters)', 'ring\\\\x07', '(the last 1,000 of 5,000 characters) ...')
    """
    if len(text) <= SHORT:
        return visible(text)
    if end:
        return f"(the last {SHORT:,} of {len(text):,} characters) ...{visible(text[-SHORT:])}"
    return f"{visible(text[:SHORT])}... (the first {SHORT:,} of {len(text):,} characters)"


def _table(subject: str, asked: list[tuple[Record, Path]], notes: list[str]) -> Table:
    labels = disambiguate([(record.lm.spec, record.test.rpartition("::")[2]) for record, _ in asked])
    columns: list[Column] = []
    questions: dict[tuple[str, int], dict[int, Example]] = {}
    for index, (label, (record, folder)) in enumerate(zip(labels, asked, strict=True)):
        judge = judge_of(metric(name, value) for name, value in record.metrics.items())
        columns.append(Column(label, record.examples or "", judge))
        seen: Counter[str] = Counter()
        for example in _read_inside(folder, record.examples or "", notes):
            questions.setdefault((example.id, seen[example.id]), {})[index] = example
            seen[example.id] += 1
    rows = [*questions.values()]
    marks = [
        "".join(mark(column.score(row[index])) if index in row else ABSENT for row in rows)
        for index, column in enumerate(columns)
    ]
    return Table(subject, asked[0][0].example, columns, rows, marks)


def _read_inside(folder: Path, name: str, notes: list[str]) -> list[Example]:
    """The examples of a file in the output folder; a document that points out of it is not followed."""
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        notes.append(f"{name} lies outside of the output folder and was not read")
        return []
    try:
        lines = list(read(file))
    except OSError as error:
        notes.append(f"the examples of {name} are not shown: {error.strerror or error}")
        return []
    if broken := lines.count(None):
        notes.append(f"{broken} of {len(lines)} lines of {name} cannot be read and are not shown")
    return [example for example in lines if example is not None]


def _embedded(tables: list[Table], notes: list[str]) -> list[dict[str, Any]]:
    """The tables as plain data, with as many of their rows as `EMBEDDED` allows."""
    indices = ((number, table, index) for number, table in enumerate(tables) for index in range(len(table.rows)))
    order = sorted((_rank(table, index), index, number) for number, table, index in indices)
    metrics = [
        list(dict.fromkeys(name for row in table.rows for one in row.values() for name in one.scores)) for table in tables
    ]
    rows: list[list[Any]] = [[None] * len(table.rows) for table in tables]
    left, kept = EMBEDDED, Counter[int]()
    for _, index, number in order:
        row = _row(tables[number], index, metrics[number])
        left -= len(json.dumps(row, separators=(",", ":")))
        if left < 0:
            break
        rows[number][index] = row
        kept[number] += 1
    for number, table in enumerate(tables):
        if kept[number] < len(table.rows):
            files = ", ".join(column.file for column in table.columns)
            notes.append(
                f"{table.subject}: the texts of {kept[number]:,} of {several(len(table.rows), table.example)} are in this "
                f"page, flips and wrong answers first; all are in {files}"
            )
    return [
        {
            "subject": table.subject,
            "example": table.example,
            "metrics": [metric(name).label for name in names],
            "columns": [
                {"label": column.label, "file": column.file, "marks": marks}
                for column, marks in zip(table.columns, table.marks, strict=True)
            ],
            "rows": shown,
        }
        for table, names, shown in zip(tables, metrics, rows, strict=True)
    ]


def _rank(table: Table, index: int) -> int:
    """0 for a question that some answered rightly and others wrongly, 1 for others with a wrong answer, 2 for the rest."""
    marks = {own[index] for own in table.marks}
    return 0 if {RIGHT, WRONG} <= marks else 1 if marks & {WRONG, PARTLY} else 2


def _row(table: Table, index: int, metrics: list[str]) -> list[Any]:
    """A question: number, id, group, choices, right choices, target, and for each column its prompt (None where it is that of
    the first), answer (an index where there are choices), log-likelihoods, scores, and the score that it is marked by.
    """
    row = table.rows[index]
    first = next(iter(row.values()))
    choices = [shortened(choice) for choice in first.choices]
    target = "" if choices else shortened(first.target or "")
    examples = [row.get(number) for number in range(len(table.columns))]
    asked = [*zip(table.columns, examples, strict=True)]
    prompts = [None if one is None or (one is not first and one.prompt == first.prompt) else one.prompt for one in examples]
    return [
        first.number,
        first.id,
        first.group,
        choices,
        list(first.right),
        target,
        [None if prompt is None else shortened(prompt, end=True) for prompt in prompts],
        [_answer(one, choices) for one in examples],
        [None if one is None or not choices else [round(value, 3) for value in one.loglikelihoods] for one in examples],
        [None if one is None else [_digits(one.scores.get(name)) for name in metrics] for one in examples],
        [None if one is None else _digits(column.score(one)) for column, one in asked],
    ]


def _answer(example: Example | None, choices: list[str]) -> int | str | None:
    if example is None:
        return None
    return example.chosen if choices and example.chosen is not None else shortened(example.output)


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
