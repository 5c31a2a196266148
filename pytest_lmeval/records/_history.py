"""What the runs in a folder have measured so far: a JSON line for each number of each run.

A run adds its lines in one piece when it ends. A line that is cut off or damaged is left out of what is read, and counted.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import RunDocument

NAME = "history.jsonl"
Key: TypeAlias = "tuple[str, str, str, str]"
"""What tells numbers apart: test, model, subject, metric."""


class Line(Struct, frozen=True, kw_only=True, gc=False):
    """One number of one run. `lm` is the spec of the model; the other fields are those of run, record and value."""

    run: str
    started: Annotated[datetime.datetime, Meta(tz=True)]
    commit: str | None
    test: str
    lm: str
    kind: str
    subject: str
    metric: str
    value: float
    low: float | None
    high: float | None
    unit: str

    @property
    def key(self) -> Key:
        return self.test, self.lm, self.subject, self.metric


@dataclass(frozen=True)
class Statistics:
    """One number over the runs that measured it."""

    runs: int
    last: float
    mean: float
    min: float
    max: float


def append(folder: Path, document: RunDocument) -> None:
    """Add a run. Raises OSError, and ValueError where it does not say when it began."""
    started = datetime.datetime.fromisoformat(document.run.started)
    text = "".join(schema.line_of(line) for line in _lines(document, started))
    with (folder / NAME).open("a", encoding="utf-8", errors="replace") as file:
        file.write(text)


def _lines(document: RunDocument, started: datetime.datetime) -> Iterator[Line]:
    for record in document.records:
        for name, value in record.metrics.items():
            yield Line(
                run=document.run.id,
                started=started,
                commit=document.environment.commit,
                test=record.test,
                lm=record.lm.spec,
                kind=record.kind,
                subject=record.subject,
                metric=name,
                value=float(value),
                low=value.low,
                high=value.high,
                unit=value.unit,
            )


def read(folder: Path) -> tuple[list[Line], list[str]]:
    """The lines of all runs in this folder in the order in which the runs ended, and what is to be said of the unreadable."""
    try:
        raw = (folder / NAME).read_bytes()
    except OSError:
        return [], []
    decoder = msgspec.json.Decoder(Line)
    lines, broken = list[Line](), 0
    for text in filter(bytes.strip, raw.splitlines()):
        try:
            lines.append(decoder.decode(text))
        except (ValueError, RecursionError):
            broken += 1
    return lines, [f"{broken} lines of {NAME} cannot be read, and are left out"] if broken else []


def statistics(lines: Iterable[Line]) -> dict[Key, Statistics]:
    """Each number over the runs, its last value being that of the last line."""
    found: dict[Key, list[Line]] = {}
    for line in lines:
        found.setdefault(line.key, []).append(line)
    return {key: _statistics(several) for key, several in found.items()}


def _statistics(several: list[Line]) -> Statistics:
    values = [line.value for line in several]
    mean = sum(value / len(values) for value in values)  # a sum of the largest floats would be infinite
    return Statistics(len({line.run for line in several}), values[-1], mean, min(values), max(values))
