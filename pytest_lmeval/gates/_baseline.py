"""The file that a run is compared with, and the file of examples beside it. Both are meant to be committed, and read in a diff.

    baseline.json             schema, environment, and of each test each record: a metric a line
    baseline.examples.jsonl   of each record a line of its columns, and below it a line for each example

Sorted keys, rounded numbers, no paths, no times: a run that changed nothing writes the same bytes. Each record has checksums of
its own, so that an edit is refused, and two branches that accepted other tests can be merged.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import structs

from pytest_lmeval.errors import BaselineError, DocumentError
from pytest_lmeval.gates._entry import Entry, sealed
from pytest_lmeval.gates._scores import Scores
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import Environment
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.records._schema import Kept

SCHEMA: Literal[2] = 2
AGAIN = "Restore it, or write it anew: run all tests with --lmeval-gate=off, then lmeval baseline accept --prune"
Tests = dict[str, dict[str, Entry]]
Examples = dict[tuple[str, str], Scores]


class Place(Kept, frozen=True, kw_only=True):
    """Of `Environment`, what can make a number another one."""

    python: str = ""
    device: str = ""
    cpu: str = ""
    threads: int | None = None
    packages: dict[str, str] = {}


class BaselineFile(Kept, frozen=True, kw_only=True):
    """The content of baseline.json. tests: test -> name of a record -> entry."""

    schema: Literal[2] = SCHEMA
    environment: Place = Place()
    tests: Tests = {}


class Head(Kept, frozen=True, kw_only=True):
    """A line of the file of examples that those of a record follow."""

    test: str
    record: str
    columns: list[str]


@dataclass(frozen=True)
class Baseline:
    """scores  (test, name of a record) -> scores; None where the file of examples is missing"""

    file: BaselineFile = field(default_factory=BaselineFile)
    scores: Examples | None = field(default_factory=dict)

    @property
    def tests(self) -> Tests:
        return self.file.tests


def place_of(environment: Environment) -> Place:
    """What a baseline keeps of the environment of a run."""
    return Place(**{name: getattr(environment, name) for name in Place.__struct_fields__ if name != schema.MORE})


def differences(old: Place, new: Place) -> list[str]:
    """How two places differ, in words."""
    before, now = ({**structs.asdict(place), **place.packages} for place in (old, new))
    names = [name for name in dict.fromkeys([*before, *now]) if name not in ("packages", schema.MORE)]
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names if before.get(name) != now.get(name)]


def examples_file(path: Path) -> Path:
    """Where the examples of a baseline stand.

    >>> str(examples_file(Path("reports/baseline.json")))
    'reports/baseline.examples.jsonl'
    """
    return path.with_suffix("").with_name(f"{path.with_suffix('').name}.examples.jsonl")


def read(path: Path) -> Baseline | None:
    """The baseline at `path`; None if there is no such file.

    Raises BaselineError where it, or its file of examples, cannot be read, is of another schema version, or is not as it was
    written: with the place and the reason.
    """
    try:
        raw = _bytes(path)
        return None if raw is None else _checked(path, _file(path, raw), _scores(examples_file(path)))
    except DocumentError as error:
        raise BaselineError(str(error)) from error


def write(path: Path, baseline: Baseline) -> None:
    """Write both files, each in one move; the examples first, so that no summary stands without them."""
    scores = baseline.scores or {}
    lines: list[str] = []
    for (test, record), found in sorted(scores.items()):
        lines.append(json.dumps({**found.more, "test": test, "record": record, "columns": ["id", "group", *found.columns]}))
        lines += found.lines()
    with replacing(examples_file(path)) as new:
        new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    sums = {place: found.checksum for place, found in scores.items()}
    tests = {
        test: {name: sealed(entry, (test, name), sums.get((test, name), "")) for name, entry in records.items()}
        for test, records in baseline.tests.items()
    }
    document = schema.to_plain(structs.replace(baseline.file, tests=tests))
    with replacing(path) as new:
        new.write_text("\n".join(_lines(document)) + "\n", encoding="utf-8", newline="\n")


def contradictions(tests: Tests, scores: Examples) -> Iterator[tuple[str, str, str]]:
    """Where the examples do not make the number of the summary: test, record, and what each of them says."""
    for test, record, entry in _entries(tests):
        examples = scores.get((test, record))
        for name, value in entry.metrics.items():
            exponential = metric(name).exponential
            if exponential and min(value, value if value.low is None else value.low) <= 0:
                yield test, record, f"{name} is {value!r}, and an exponential is above 0"
                continue
            if examples is None or value.n is None or (made := examples.made(name)) is None:
                continue
            mean, n = made
            said = math.log(value) if exponential else value
            if n != value.n or mean is None or not math.isclose(mean, said, rel_tol=1e-5, abs_tol=1e-9):
                what = "nothing" if mean is None else f"{math.exp(min(mean, 700)) if exponential else mean:.7g}"
                yield test, record, f"{name} is {value:.7g} of {value.n:,}, and its examples make {what} of {n:,}"


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BaselineError(f"{path} cannot be read ({error.strerror or error}). {AGAIN}.") from error


def _file(path: Path, raw: bytes) -> BaselineFile:
    what = f"the baseline {path}"
    plain = schema.parse(raw, what, AGAIN)
    schema.check_version(plain.get("schema") if isinstance(plain, dict) else None, SCHEMA, what, AGAIN)
    return schema.build(plain, BaselineFile, what, AGAIN)


def _checked(path: Path, file: BaselineFile, scores: Examples | None) -> Baseline:
    edited = f"was damaged or edited by hand. {AGAIN}."
    for test, record in scores or {}:
        if record not in file.tests.get(test, {}):
            raise BaselineError(
                f"{examples_file(path)} has examples of {test}, {record}, which {path} does not have: it {edited}"
            )
    if scores is not None:
        sums = {place: found.checksum for place, found in scores.items()}
        for test, record, entry in _entries(file.tests):
            if entry.examples != sums.get((test, record), ""):
                what = f"the examples of {test}, {record} do not have the checksum that {path} has of them"
                raise BaselineError(f"{examples_file(path)}: {what}. One of both {edited}")
    for test, record, problem in contradictions(file.tests, scores or {}):
        raise BaselineError(f"{path}: of {test}, {record}, {problem}. It {edited}")
    for test, record, entry in _entries(file.tests):
        if sealed(entry, (test, record), entry.examples) != entry:
            raise BaselineError(f"{path}: {test}, {record} does not have the checksum that was written with it. It {edited}")
    return Baseline(file, scores)


def _entries(tests: Tests) -> Iterator[tuple[str, str, Entry]]:
    return ((test, record, entry) for test, records in tests.items() for record, entry in records.items())


def _scores(path: Path) -> Examples | None:
    raw = _bytes(path)
    if raw is None:
        return None
    found: Examples = {}
    columns: list[list[Any]] = []
    kind: Any = tuple[()]  # of an example
    for number, line in enumerate(raw.splitlines(), start=1):
        what = f"{path}, line {number}"
        row = schema.parse(line, what, AGAIN)
        if isinstance(row, dict):
            head = schema.build(row, Head, what, AGAIN)
            if head.columns[:2] != ["id", "group"] or len(set(head.columns)) != len(head.columns):
                raise _no_example(what, line)
            ids, groups, *rest = columns = [[] for _ in head.columns]
            found[head.test, head.record] = Scores(ids, groups, dict(zip(head.columns[2:], rest, strict=True)), more=head.more)
            kind = tuple.__class_getitem__((str, str | None, *[int | float | None] * len(rest)))
            continue
        try:
            values = msgspec.convert(row, kind)
        except msgspec.ValidationError:
            raise _no_example(what, line) from None
        if any(value is not None and abs(value) > sys.float_info.max for value in values[2:]):
            raise _no_example(what, line)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return found


def _no_example(what: str, line: bytes) -> BaselineError:
    shown = line[: schema.SHOWN].decode(errors="replace")
    return BaselineError(f"{what} is {shown!r}: neither the head of a record nor an example of the one above. {AGAIN}.")


def _lines(value: dict[str, Any], indent: str = " ") -> Iterator[str]:
    """JSON with sorted keys, in which what holds only plain values stands on one line."""
    yield "{"
    for place, (key, part) in enumerate(sorted(value.items())):
        comma = "," if place < len(value) - 1 else ""
        if isinstance(part, dict) and any(isinstance(inner, dict) for inner in part.values()):
            first, *rest = _lines(part, indent + " ")
            yield f"{indent}{json.dumps(key)}: {first}"
            yield from rest[:-1]
            yield f"{indent}}}{comma}"
        else:
            yield f"{indent}{json.dumps(key)}: {json.dumps(part, sort_keys=True, allow_nan=False)}{comma}"
    yield "}"
