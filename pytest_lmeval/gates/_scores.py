"""Read what each example counts in each metric, so that two runs can be compared example by example.

Each answer of a task, and each document or block of a reading, becomes a row: the hash of its text, and rounded numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example, Unit
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import is_declared, metric
from pytest_lmeval.records._replacing import inside

T = TypeVar("T")
SHOWN = 60  # characters of an output
AGAIN = "Run the tests again, and accept that run"


@dataclass(frozen=True)
class Scores:
    """ids      [n] hash of each question or text; the second of equal ones is `ID#2`
    groups   [n] what each shares with others; None: nothing
    columns  name -> [n] what each answer counts in a metric (None: nothing), or the sums of a reading over each block
    texts    id -> output and target, shortened; of this run only, a baseline does not keep them
    consecutive  the rows are blocks of one text, in order
    more     fields of a later version in the head of a baseline's record
    """

    ids: list[str]
    groups: list[str | None]
    columns: dict[str, list[float | None]]
    texts: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    consecutive: bool = False

    def ratio(self, name: str) -> list[tuple[float, float] | None] | None:
        """(numerator, denominator) of each example [n] in a metric; None if the metric is no such ratio."""
        if (values := self.columns.get(name)) is not None:
            return [None if value is None else (value, 1.0) for value in values]
        above, below = (self.columns.get(column) for column in metric(name).sums or ("", ""))
        if above is None or below is None:
            return None
        pairs = zip(above, below, strict=True)
        return [None if over is None or under is None else (over, under) for over, under in pairs]

    def by_question(self, name: str) -> dict[str, list[float]] | None:
        """What the answers to each question count in a metric; None if the metric is no mean of scores."""
        if (column := self.columns.get(name)) is None:
            return None
        found: dict[str, list[float]] = {}
        for example, value in zip(self.ids, column, strict=True):
            if value is not None:
                found.setdefault(question_of(example), []).append(value)
        return found

    def mean_of(self, name: str) -> tuple[float | None, int] | None:
        """The metric over all examples (the logarithm of a perplexity; None if divided by 0), and its number of answers or
        tokens. None if the metric is no such ratio."""
        if (ratio := self.ratio(name)) is None:
            return None
        counted = [pair for pair in ratio if pair is not None]
        above, below = (math.fsum(side) for side in zip(*counted, strict=True)) if counted else (0.0, 0.0)
        n = len(counted) if name in self.columns else round(math.fsum(value or 0 for value in self.columns.get("tokens", ())))
        return (metric(name).scale * above / below if below else None), n

    def lines(self) -> list[str]:
        """The rows as lines of the examples file."""
        rows = zip(self.ids, self.groups, *self.columns.values(), strict=True)
        return [json.dumps(row, separators=(",", ":"), allow_nan=False) for row in rows]

    @property
    def checksum(self) -> str:
        return hashlib.sha256("\n".join([*self.columns, *self.lines()]).encode()).hexdigest()[:16]


def keeps_examples(record: Record) -> bool:
    """Whether a file of the run holds the scores of each example."""
    return record.units is not None or (record.examples or "").endswith(".jsonl")


def scores_of(record: Record, folder: Path) -> Scores | None:
    """The scores of a record, from its file in the output folder, if there is one. Raises DocumentError for an edited line."""
    if not keeps_examples(record):
        return None
    name = record.units or record.examples or ""
    if (lines := _lines(folder, name)) is None:
        return None
    if record.units:
        return _of_units(_read(folder / name, lines, Unit), consecutive=record.example == "block")
    return _of_answers(_read(folder / name, lines, Example), record)


def rounded(value: float) -> float:
    """Seven significant digits, and whole numbers as int. Keeps what is not finite.

    >>> rounded(0.123456789), rounded(3.0)
    (0.1234568, 3)
    """
    if abs(value) < 1e15 and value == int(value):
        return int(value)
    return float(f"{value:.7g}")


def rounded_or_none(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def question_of(example: str) -> str:
    """The id of the question that an answer of this id belongs to."""
    return example.partition("#")[0]


def numbered(names: list[str], mark: str = "#") -> list[str]:
    """The names, with a number after the second and later of equal ones: a, b, a#2."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}{mark}{seen[name]}")
    return found


def _lines(folder: Path, name: str) -> list[bytes] | None:
    """The lines of a file in the folder; None if there is none."""
    try:
        return inside(folder, name).read_bytes().splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DocumentError(f"{folder / name} cannot be read ({error.strerror or error}). {AGAIN}.") from error


def _read(file: Path, lines: list[bytes], kind: type[T]) -> list[T]:
    what = [f"{file}, line {number}" for number in range(1, len(lines) + 1)]
    return [schema.build(schema.parse(line, of, AGAIN), kind, of, AGAIN) for line, of in zip(lines, what, strict=True)]


def _of_units(units: list[Unit], *, consecutive: bool) -> Scores:
    names = dict.fromkeys(name for unit in units for name in unit.sums)
    columns = {name: [rounded_or_none(unit.sums.get(name)) for unit in units] for name in names}
    return Scores(numbered([unit.id for unit in units]), [None] * len(units), columns, consecutive=consecutive)


def _of_answers(examples: list[Example], record: Record) -> Scores:
    examples = sorted(examples, key=lambda example: example.place)
    several = any(example.repeat for example in examples)
    scored = [name for name in record.metrics if any(name in example.scores for example in examples)]
    by_row = record.details.get("scored", {})  # what the scorer of a task gives names of its own is a mean
    if unknown := [name for name in scored if not (name in by_row or is_declared(name))]:
        who = f"no installed package registers the metric {', '.join(unknown)}"
        raise DocumentError(f"{who}, so how examples add up to it is unknown. Install the package that does.")
    # Only a mean of scores with a better direction can be gained or lost example by example.
    known = {name: metric(name, record.metrics[name]) for name in scored}
    means = [name for name, one in known.items() if one.statistic is None and one.higher_is_better is not None]
    columns = {name: [rounded_or_none(example.scores.get(name)) for example in examples] for name in means}
    ids = numbered([example.id for example in examples])
    shared = [example.group or (f"{example.id} {example.number}" if several else None) for example in examples]
    groups = [None if group is None else hashlib.sha256(group.encode()).hexdigest()[:8] for group in shared]
    texts = {
        name: (_short(example.answer), None if example.target is None else _short(example.target))
        for name, example in zip(ids, examples, strict=True)
    }
    return Scores(ids, groups, columns, texts)


def _short(text: str) -> str:
    """One line of at most 60 printable characters."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: SHOWN + 1])
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
