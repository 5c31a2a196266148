"""Append runs to `history.jsonl` and read them: one JSON line for each number of each run.

A run appends all its lines at once when it ends. Truncated or damaged lines are ignored and counted.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import RunDocument
from pytest_lmeval.records._replacing import append as append_lines, inside

NAME = "history.jsonl"
Key: TypeAlias = "tuple[str, str, str, str]"
"""Identity of a number over runs: test, model, subject, metric."""


class Line(Struct, frozen=True, gc=False):
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
    """Statistics of one number over the runs that measured it."""

    runs: int
    last: float
    mean: float
    min: float
    max: float


def append(folder: Path, document: RunDocument) -> None:
    """Add a run. Raises OSError, and ValueError if the run has no start time."""
    started = datetime.datetime.fromisoformat(document.run.started)
    run = (document.run.id, started, document.environment.commit)
    lines = []
    for record in document.records:
        of = (*run, record.test, record.lm.spec, record.kind, record.subject)
        for name, value in record.metrics.items():
            low, high = value.interval or (None, None)
            lines.append(Line(*of, name, float(value), low, high, value.unit))
    if lines:
        append_lines(folder / NAME, "".join(map(schema.line_of, lines)).encode(errors="replace"))


def read(folder: Path) -> tuple[list[Line], list[str]]:
    """Read the lines of all runs of a folder, in the order in which the runs ended, and a note on unreadable lines."""
    try:
        raw = inside(folder, NAME).read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{NAME} cannot be read: {error.strerror or error}"]
    decoder = msgspec.json.Decoder(Line)
    lines, broken = list[Line](), 0
    for text in filter(bytes.strip, raw.splitlines()):
        try:
            lines.append(decoder.decode(text))
        except (ValueError, RecursionError):
            broken += 1
    return lines, [f"{broken} lines of {NAME} cannot be read and are ignored"] if broken else []


def statistics(lines: Iterable[Line]) -> dict[Key, Statistics]:
    """Compute the statistics of each number; the last value is that of the last line."""
    by_key: dict[Key, list[Line]] = {}
    for line in lines:
        by_key.setdefault(line.key, []).append(line)
    found = {}
    for key, group in by_key.items():
        values = [line.value for line in group]
        mean = sum(value / len(values) for value in values)  # a sum of the largest floats would be infinite
        found[key] = Statistics(len({line.run for line in group}), values[-1], mean, min(values), max(values))
    return found
