"""Build the example tables of the page: question by question, the models side by side.

An answer is marked by its score in the metric of its record that judges answers. The page shortens each text to `SHORT`
characters and embeds `EMBEDDED` characters of questions: those with flips first, then those with wrong answers. It holds the
marks of all questions; the files of examples hold all texts. Of an example that is not embedded only its marks are held, and
where its line stands.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_lmeval.records._example import Example, Outcome, example_of
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
    path: Path

    def score(self, example: Example) -> float | None:
        """1 for a right answer, 0 for a wrong one; None without a judge."""
        return None if self.judge is None else example.scores.get(self.judge.name)

    def example(self, at: int) -> Example:
        """That of the line that begins there. Raises OSError, and ValueError if another process has replaced the file."""
        with open(self.path, "rb") as lines:
            lines.seek(at)
            return example_of(lines.readline())


@dataclass(frozen=True)
class Table:
    """The questions of one subject.

    example   name of one of them
    metrics   that say something of any of the questions
    marks     for each column, a character for each question: whether the answer is right
    outcomes  for each column, a character for each question: what became of the answer; empty if none was generated
    lines     for each column, where the line of each question begins in its file; -1 where it has none
    """

    subject: str
    example: str
    columns: list[Column]
    metrics: list[str]
    marks: list[str]
    outcomes: list[str]
    lines: list[array[int]]

    def __len__(self) -> int:
        return len(self.marks[0])

    def row(self, index: int) -> dict[int, Example]:
        """Column index -> example of a question."""
        found = {}
        for number, (column, lines) in enumerate(zip(self.columns, self.lines, strict=True)):
            if lines[index] >= 0:
                found[number] = column.example(lines[index])
        return found


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
    return _embedded([table for table in found if len(table)], notes), notes


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
    metrics: dict[str, None] = {}
    questions: dict[tuple[str, int], int] = {}
    marks, outcomes, lines = list[bytearray](), list[bytearray](), list["array[int]"]()
    for label, (record, folder) in zip(labels, group, strict=True):
        name = record.examples or ""
        column = Column(label, name, judge_in(record), (folder / name).absolute())
        columns.append(column)
        marks.append(bytearray(ABSENT.encode() * len(questions)))
        outcomes.append(bytearray(marks[-1]))
        lines.append(array("q", [-1]) * len(questions))
        seen: Counter[str] = Counter()
        for at, example in _placed(folder, name, notes):
            if len(group) == 1:
                index = len(lines[-1])
            else:
                index = questions.setdefault((example.id, seen[example.id]), len(questions))
                seen[example.id] += 1
            if index == len(lines[-1]):
                for known in (*marks, *outcomes):
                    known.append(ord(ABSENT))
                for places in lines:
                    places.append(-1)
            marks[-1][index] = ord(mark(column.score(example)))
            outcomes[-1][index] = ord(OUTCOMES.get(example.outcome, ABSENT))
            lines[-1][index] = at
            metrics |= dict.fromkeys(name for name, score in example.scores.items() if score is not None)
    told = [own if own.strip(ABSENT) else "" for own in (own.decode() for own in outcomes)]
    return Table(subject, group[0][0].example, columns, [*metrics], [own.decode() for own in marks], told, lines)


def examples_in(folder: Path, name: str, notes: list[str]) -> Iterator[Example]:
    """Yield the examples of a file inside of the output folder; note what cannot be read."""
    return (example for _, example in _placed(folder, name, notes))


def _placed(folder: Path, name: str, notes: list[str]) -> Iterator[tuple[int, Example]]:
    """Yield where the line of each example begins, and the example."""
    total, broken, at = 0, 0, 0
    try:
        with open(inside(folder, name), "rb") as lines:
            for line in lines:
                begin, at = at, at + len(line)
                if not line.strip():
                    continue
                total += 1
                try:
                    yield begin, example_of(line)
                except (ValueError, RecursionError):
                    broken += 1
    except OSError as error:
        notes.append(f"the examples of {name} are not shown: {error.strerror or error}")
    if broken:
        notes.append(f"{broken} of {total} lines of {name} cannot be read and are not shown")


def _embedded(tables: list[Table], notes: list[str]) -> list[dict[str, Any]]:
    """The tables as plain data, with as many of their rows as `EMBEDDED` allows."""
    rows: list[list[Any]] = [[None] * len(table) for table in tables]
    left = EMBEDDED
    for number, index in _order(tables):
        try:
            row = _row(tables[number], index)
        except (OSError, ValueError) as error:
            notes.append(f"{tables[number].subject}: no more texts are shown, since their file has changed ({error})")
            break
        left -= len(json.dumps(row, separators=(",", ":")))
        if left < 0:
            break
        rows[number][index] = row
    found = []
    for table, shown in zip(tables, rows, strict=True):
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
        labels = [metric(name).label for name in table.metrics]
        found.append({"subject": table.subject, "example": table.example, "metrics": labels, "columns": columns, "rows": shown})
    return found


def _order(tables: Sequence[Table]) -> Iterator[tuple[int, int]]:
    """The questions (number of the table, index), in the order in which they are embedded."""
    ranks = [bytes(_rank(table, index) for index in range(len(table))) for table in tables]
    for rank in range(3):
        for index in range(max(map(len, ranks), default=0)):
            yield from ((number, index) for number, own in enumerate(ranks) if index < len(own) and own[index] == rank)


def _rank(table: Table, index: int) -> int:
    """0 for a flip (right and wrong answers), 1 for other questions with a wrong answer, 2 for the rest."""
    marks = {own[index] for own in table.marks}
    return 0 if {RIGHT, WRONG} <= marks else 1 if marks & {WRONG, PARTLY} else 2


def _row(table: Table, index: int) -> list[Any]:
    """A question: number, id, group, choices, right choices, target; then for each column its prompt (None if it is the first
    one's), answer (an index if there are choices), log-likelihoods, scores, the score that marks it, and thought.
    """
    row = table.row(index)
    first = next(iter(row.values()))
    choices = [shortened(choice) for choice in first.choices]
    target = "" if choices else shortened(first.target or "")
    own: list[list[Any]] = [[None] * len(table.columns) for _ in range(6)]
    for number, one in row.items():
        values = (
            shortened(one.prompt, end=True) if one is first or one.prompt != first.prompt else None,
            one.chosen if choices and one.chosen is not None else shortened(one.output),
            [round(value, 3) for value in one.loglikelihoods] if choices else None,
            [_digits(one.scores.get(name)) for name in table.metrics],
            _digits(table.columns[number].score(one)),
            shortened(one.thought),
        )
        for column, value in zip(own, values, strict=True):
            column[number] = value
    return [first.number, first.id, first.group, choices, list(first.right), target, *own]


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
