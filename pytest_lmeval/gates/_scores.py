"""What each example counted, so that two runs can be compared example by example.

A task has a line for each answer, a reading one for each document or block. Both become columns of numbers beside the hash of
what was asked or read, rounded to seven digits: a run that changed nothing leaves the same file.
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

T = TypeVar("T")
SHOWN = 60  # characters of an output
AGAIN = "Run the tests again, and accept that run"


@dataclass(frozen=True)
class Scores:
    """ids      [n] of what was asked or read; of equal ones the second is called `ID#2`
    groups   [n] what each shares with others; None: nothing
    columns  name -> [n] numbers: of answers, what each counts in a metric, None where the metric is not about it; of a reading,
             the sums over each document or block
    said     id -> output and target, shortened; only of the run itself, never kept in a baseline
    more     what the line of the columns holds beside them, written by a later version
    """

    ids: list[str]
    groups: list[str | None]
    columns: dict[str, list[float | None]]
    said: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def ratio(self, name: str) -> list[tuple[float, float] | None] | None:
        """What each example [n] adds to the sum of a metric, and to what that is divided by; None if it is no such ratio."""
        if (values := self.columns.get(name)) is not None:
            return [None if value is None else (value, 1.0) for value in values]
        above, below = (self.columns.get(column) for column in metric(name).sums or ("", ""))
        if above is None or below is None:
            return None
        pairs = zip(above, below, strict=True)
        return [None if over is None or under is None else (over, under) for over, under in pairs]

    def made(self, name: str) -> tuple[float | None, int] | None:
        """What all examples make of a metric (of a perplexity its logarithm), and its `n`: answers, or tokens of a reading.

        None if it is no such ratio; its first part is None if that is divided by 0.
        """
        if (ratio := self.ratio(name)) is None:
            return None
        counted = [pair for pair in ratio if pair is not None]
        above, below = (math.fsum(side) for side in zip(*counted, strict=True)) if counted else (0.0, 0.0)
        n = len(counted) if name in self.columns else round(math.fsum(value or 0 for value in self.columns.get("tokens", ())))
        return (metric(name).scale * above / below if below else None), n

    def lines(self) -> list[str]:
        """As they stand in the file of examples, below the line of the columns."""
        rows = zip(self.ids, self.groups, *self.columns.values(), strict=True)
        return [json.dumps(row, separators=(",", ":"), allow_nan=False) for row in rows]

    @property
    def checksum(self) -> str:
        return hashlib.sha256("\n".join([*self.columns, *self.lines()]).encode()).hexdigest()[:16]


def keeps_examples(record: Record) -> bool:
    """Whether what each example counts is in a file that can be compared."""
    return record.units is not None or (record.examples or "").endswith(".jsonl")


def scores_of(record: Record, folder: Path) -> Scores | None:
    """The scores of a record, from the files that it names in the output folder; None if it has none, or they are gone.

    Raises DocumentError for a line that is not as it was written.
    """
    name = (record.units or record.examples) if keeps_examples(record) else None
    if name is None or not (file := folder / name).exists():
        return None
    return _of_units(_read(file, Unit)) if record.units else _of_answers(_read(file, Example), list(record.metrics))


def rounded(value: float) -> float:
    """Seven digits that matter, and no point after a whole number. What is not finite stays as it is.

    >>> rounded(0.123456789), rounded(3.0)
    (0.1234568, 3)
    """
    if abs(value) < 1e15 and value == int(value):
        return int(value)
    return float(f"{value:.7g}")


def numbered(names: list[str], mark: str = "#") -> list[str]:
    """The names, equal ones told apart.

    >>> numbered(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}{mark}{seen[name]}")
    return found


def _read(file: Path, kind: type[T]) -> list[T]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DocumentError(f"{file} cannot be read ({error.strerror or error}). {AGAIN}.") from error
    found = []
    for number, line in enumerate(lines, start=1):
        what = f"{file}, line {number}"
        found.append(schema.build(schema.parse(line, what, AGAIN), kind, what, AGAIN))
    return found


def _of_units(units: list[Unit]) -> Scores:
    names = dict.fromkeys(name for unit in units for name in unit.sums)
    columns = {name: [_or_none(unit.sums.get(name)) for unit in units] for name in names}
    return Scores(numbered([unit.id for unit in units]), [None] * len(units), columns)


def _is_compared(name: str) -> bool:
    """Whether the scores of examples make the metric, and one of its directions is better: else nothing is gained or lost."""
    return metric(name).statistic is None and metric(name).higher_is_better is not None


def _of_answers(examples: list[Example], metrics: list[str]) -> Scores:
    examples = sorted(examples, key=lambda example: example.number)
    if strange := [name for name in metrics if not is_declared(name) and any(name in one.scores for one in examples)]:
        raise DocumentError(
            f"nobody registers the metric {', '.join(strange)} here, so that it is not known how examples add up to it. "
            "Install the package that does."
        )
    means = [name for name in metrics if _is_compared(name) and any(name in one.scores for one in examples)]
    columns = {name: [_or_none(example.scores.get(name)) for example in examples] for name in means}
    ids = numbered([example.id for example in examples])
    groups = [None if example.group is None else hashlib.sha256(example.group.encode()).hexdigest()[:8] for example in examples]
    said = {
        name: (_short(example.answer), None if example.target is None else _short(example.target))
        for name, example in zip(ids, examples, strict=True)
    }
    return Scores(ids, groups, columns, said)


def _or_none(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def _short(text: str) -> str:
    """On one line, with nothing in it that a terminal would obey, and not longer than a line holds."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: SHOWN + 1])
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
