"""The answered questions of a run, as the page shows them: question by question, the models side by side.

What a page embeds is bounded, and what is left out is said: a text is shortened to `SHORT` characters, and of very many
questions those with flips come first, then the wrong ones, until `EMBEDDED` characters are used. Whether each answer is right
is there for every question. Everything in full stands in the files of examples.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pytest_lmeval.report.words import told_apart, visible

SHORT = 1_000
EMBEDDED = 4_000_000
RIGHT, WRONG, UNJUDGED, ABSENT = "1", "0", "-", "."

Question = dict[str, Any]


def boards(records: Sequence[dict[str, Any]], folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """A board for each subject with files of examples, and lines on what could not be read or is not embedded.

    folders  for each record, the output folder that its file is relative to

    A board has a column for each record, whose `marks` has a character for each question (right, wrong, unjudged, not asked),
    and `rows`: for each question [number, id, group, choices, right places, target, answers, log-likelihoods], or None where it
    is not embedded. Where there are choices, an answer is a place among them.
    """
    by_subject: dict[str, list[tuple[dict[str, Any], Path]]] = {}
    for record, folder in zip(records, folders, strict=True):
        if str(record["examples"] or "").endswith(".jsonl"):
            by_subject.setdefault(record["subject"], []).append((record, folder))
    notes: list[str] = []
    found = [_board(subject, several, notes) for subject, several in by_subject.items()]
    found = [board for board in found if board["rows"]]
    _embed(found, notes)
    return found, notes


def read(file: Path) -> Iterator[Question | None]:
    """The questions of a file of examples; None for a line that is no JSON object. Raises OSError."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                question = json.loads(line)
            except ValueError:
                question = None
            yield question if isinstance(question, dict) else None


def mark(question: Question) -> str:
    """Whether it was answered rightly, as the metric accuracy has it: the likeliest choice, or the text as it is."""
    if question.get("choices"):
        place = _predicted(question)
        return UNJUDGED if place is None else RIGHT if place in (question.get("right") or ()) else WRONG
    if isinstance(question.get("judged"), bool):
        return RIGHT if question["judged"] else WRONG
    targets = question.get("targets") or [question.get("target")]
    if targets == [None] or question.get("prediction") is None:
        return UNJUDGED
    return RIGHT if question["prediction"] in targets else WRONG


def shortened(text: Any) -> str:
    """At most `SHORT` characters of it, and how many there were; control characters written out.

    >>> shortened("a" * 5_000)[-40:], shortened("ring\\x07")
    ('.. (the first 1,000 of 5,000 characters)', 'ring\\\\x07')
    """
    text = text if isinstance(text, str) else "" if text is None else str(text)
    length = len(text)
    return visible(text) if length <= SHORT else f"{visible(text[:SHORT])}... (the first {SHORT:,} of {length:,} characters)"


def _board(subject: str, several: list[tuple[dict[str, Any], Path]], notes: list[str]) -> dict[str, Any]:
    names = told_apart([(record["lm"]["spec"], record["test"].rpartition("::")[2]) for record, _ in several])
    columns, questions = [], dict[tuple[str, int], dict[int, Question]]()
    for place, (name, (record, folder)) in enumerate(zip(names, several, strict=True)):
        columns.append({"label": name, "file": record["examples"]})
        seen: Counter[str] = Counter()
        for question in _read_inside(folder, record["examples"], notes):
            identity = str(question.get("id", ""))
            questions.setdefault((identity, seen[identity]), {})[place] = question
            seen[identity] += 1
    rows = list(questions.values())
    for place, column in enumerate(columns):
        column["marks"] = "".join(mark(row[place]) if place in row else ABSENT for row in rows)
    return {"subject": subject, "columns": columns, "rows": rows}


def _read_inside(folder: Path, name: str, notes: list[str]) -> list[Question]:
    """The questions of a file in the output folder; a document that points out of it is not followed."""
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
    return [question for question in lines if question is not None]


def _embed(found: list[dict[str, Any]], notes: list[str]) -> None:
    """Replace the questions of the boards by what the page shows of them, as far as `EMBEDDED` goes."""
    places = ((number, board, place) for number, board in enumerate(found) for place in range(len(board["rows"])))
    order = sorted((_rank(board, place), place, number) for number, board, place in places)
    left, kept = EMBEDDED, Counter[int]()
    rows: list[list[Any]] = [[None] * len(board["rows"]) for board in found]
    for _, place, number in order:
        row = _row(found[number]["rows"][place], len(found[number]["columns"]))
        left -= _size(row)
        if left < 0:
            break
        rows[number][place] = row
        kept[number] += 1
    for number, (board, shown) in enumerate(zip(found, rows, strict=True)):
        board["rows"] = shown
        if kept[number] < len(shown):
            files = ", ".join(column["file"] for column in board["columns"])
            notes.append(
                f"{board['subject']}: the texts of {kept[number]:,} of {len(shown):,} questions are in this page, flips and "
                f"wrong answers first; all are in {files}"
            )


def _rank(board: dict[str, Any], place: int) -> int:
    """0 for a question that some answered rightly and others wrongly, 1 for one that all answered wrongly, 2 for the rest."""
    marks = {column["marks"][place] for column in board["columns"]}
    return 0 if {RIGHT, WRONG} <= marks else 1 if WRONG in marks else 2


def _row(row: dict[int, Question], columns: int) -> list[Any]:
    first = next(iter(row.values()))
    choices = [shortened(choice) for choice in first.get("choices") or ()]
    answers: list[Any] = []
    for place in range(columns):
        question = row.get(place)
        chosen = choices and question is not None and question.get("choices")
        answers.append(None if question is None else _predicted(question) if chosen else shortened(question.get("prediction")))
    target = "" if choices else shortened(first.get("target"))
    asked = (row.get(place) for place in range(columns)) if choices else ()
    scores = [None if question is None else [round(score, 3) for score in _scores(question)] for question in asked]
    number, group = first.get("number"), first.get("group")
    own = [number if isinstance(number, int) else None, str(first.get("id", "")), None if group is None else str(group)]
    return [*own, choices, list(first.get("right") or ()), target, answers, scores]


def _predicted(question: Question) -> int | None:
    """The place of the likeliest choice; None where the log-likelihoods are not all there."""
    scores = _scores(question)
    return scores.index(max(scores)) if scores else None


def _scores(question: Question) -> list[float]:
    scores = question.get("loglikelihoods") or []
    return list(scores) if all(isinstance(score, int | float) and math.isfinite(score) for score in scores) else []


def _size(row: list[Any]) -> int:
    """About how many characters it takes in the page."""
    texts = [*row[3], row[5], *(answer for answer in row[6] if isinstance(answer, str))]
    return 60 + sum(map(len, texts)) + 9 * sum(len(scores or ()) for scores in row[7])
