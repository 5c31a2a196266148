"""What each example counted, so that two runs can be compared example by example.

A task has a line for each answer, a reading one for each document or block (`scoring.units`). Both become columns of
numbers beside the hash of what was asked or read, rounded to seven digits: a run that changed nothing leaves the same file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LN2 = math.log(2)
RATIOS: dict[str, tuple[str, str, float]] = {  # metric of a reading -> column, what it is divided by, and a factor
    "nll": ("nats", "tokens", 1.0),
    "perplexity": ("nats", "tokens", 1.0),
    "bits_per_byte": ("nats", "bytes", 1 / LN2),
}
LOGARITHMIC = ("perplexity",)  # compared by the losses that they are the exponential of
SHOWN = 60  # characters of an answer


@dataclass(frozen=True)
class Scores:
    """ids      [n] of what was asked or read; of equal ones the second is called `ID#2`
    groups   [n] what each shares with others; None: nothing
    columns  name -> [n] numbers; None where the metric is not about that example
    said     id -> answer and target, shortened; only of the run itself, never kept in a baseline
    """

    ids: list[str]
    groups: list[str | None]
    columns: dict[str, list[float | None]]
    said: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def ratio(self, metric: str) -> list[tuple[float, float] | None] | None:
        """What each example [n] adds to the sum of a metric, and to what that is divided by; None if it is no such ratio."""
        above, below, _ = RATIOS.get(metric, (metric.removeprefix("token_accuracy_"), "tokens", 1.0))
        if "tokens" not in self.columns:
            values = self.columns.get(metric)
            return None if values is None else [None if value is None else (value, 1.0) for value in values]
        if not {above, below} <= set(self.columns):
            return None
        pairs = zip(self.columns[above], self.columns[below], strict=True)
        return [None if over is None or under is None else (over, under) for over, under in pairs]

    def made(self, metric: str) -> tuple[float | None, int] | None:
        """What all examples make of a metric (of a perplexity its logarithm), and its `n`: answers, or tokens of a reading.

        None if it is no such ratio; its first part is None if that is divided by 0.
        """
        if (ratio := self.ratio(metric)) is None:
            return None
        counted = [pair for pair in ratio if pair is not None]
        above, below = (math.fsum(side) for side in zip(*counted, strict=True)) if counted else (0.0, 0.0)
        n = round(math.fsum(value or 0 for value in self.columns["tokens"])) if "tokens" in self.columns else len(counted)
        return (self.factor(metric) * above / below if below else None), n

    def factor(self, metric: str) -> float:
        """What that ratio is multiplied by."""
        return RATIOS[metric][2] if "tokens" in self.columns and metric in RATIOS else 1.0


def scores_of(record: dict[str, Any], folder: Path) -> Scores | None:
    """The scores of a record, from the files that it names in the output folder; None if it has none, or they are gone."""
    if record.get("units") and (file := folder / record["units"]).exists():
        return _of_units([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    if record["kind"] == "task" and record.get("examples") and (file := folder / record["examples"]).exists():
        return _of_answers(file, list(record["metrics"]))
    return None


def rounded(value: float | None) -> float | None:
    """Seven digits that matter, and no point after a whole number. What is no finite number stays as it is.

    >>> rounded(0.123456789), rounded(3.0), rounded(None)
    (0.1234568, 3, None)
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return value
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.7g}")


def _of_units(rows: list[dict[str, Any]]) -> Scores:
    columns = [name for name in (rows[0] if rows else {}) if name != "id"]
    values = {name: [rounded(row[name]) for row in rows] for name in columns}
    return Scores(_numbered([row["id"] for row in rows]), [None] * len(rows), values)


def _of_answers(file: Path, metrics: list[str]) -> Scores:
    from pytest_lmeval.scoring.answers import AnswerFile
    from pytest_lmeval.scoring.measures import METRICS

    examples = [example for _, example in sorted(AnswerFile(file).read().items())]
    known = {name: METRICS[name].score for name in metrics if name in METRICS}
    columns = {name: [rounded(score(example)) for example in examples] for name, score in known.items() if score is not None}
    ids = _numbered([example.id for example in examples])
    groups = [None if example.group is None else hashlib.sha256(example.group.encode()).hexdigest()[:8] for example in examples]
    said = {
        name: (_short(example.answer), _target(example.targets or tuple(example.choices[place] for place in example.right)))
        for name, example in zip(ids, examples, strict=True)
    }
    return Scores(ids, groups, columns, said)


def _target(targets: tuple[str, ...]) -> str | None:
    return _short(targets[0].strip()) if targets else None


def _short(text: str) -> str:
    """On one line, with nothing in it that a terminal would obey, and not longer than a line holds."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: SHOWN + 1])
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."


def _numbered(ids: list[str]) -> list[str]:
    """The ids, equal ones told apart.

    >>> _numbered(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen: Counter[str] = Counter()
    names = []
    for name in ids:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names
