"""Read and write a baseline: two files to commit, which a run that changed nothing writes again byte for byte.

    baseline.json             schema, environment, and the records of each test, one line per metric
    baseline.examples.jsonl   for each record a line with its columns, then one line per example

Each record has its own checksums, so edits are refused, and branches that accepted different tests can be merged.
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
from pytest_lmeval.records._replacing import regular, replacing
from pytest_lmeval.records._schema import StoredStruct

SCHEMA: Literal[2] = 2
AGAIN = "Restore it, or write it anew: run all tests with --lmeval-gate=off, then lmeval baseline accept --prune"
Tests = dict[str, dict[str, Entry]]
Examples = dict[tuple[str, str], Scores]


class Platform(StoredStruct, frozen=True, kw_only=True):
    """The part of `Environment` that can change a number."""

    python: str = ""
    device: str = ""
    cpu: str = ""
    threads: int | None = None
    packages: dict[str, str] = {}


class BaselineFile(StoredStruct, frozen=True, kw_only=True):
    """The content of baseline.json. tests: test -> record name -> entry."""

    schema: Literal[2] = SCHEMA
    environment: Platform = Platform()
    tests: Tests = {}


class Head(StoredStruct, frozen=True, kw_only=True):
    """The line of the examples file above the examples of a record."""

    test: str
    record: str
    columns: list[str]


@dataclass(frozen=True)
class Baseline:
    """scores  (test, record name) -> scores; None if the examples file is missing"""

    file: BaselineFile = field(default_factory=BaselineFile)
    scores: Examples | None = field(default_factory=dict)

    @property
    def tests(self) -> Tests:
        return self.file.tests


def platform_of(environment: Environment) -> Platform:
    """The part of a run's environment that a baseline keeps."""
    return Platform(**{name: getattr(environment, name) for name in Platform.__struct_fields__ if name != schema.MORE})


def differences(old: Platform, new: Platform) -> list[str]:
    """The differences between two platforms, in words."""
    before, now = ({**structs.asdict(platform), **platform.packages} for platform in (old, new))
    names = [name for name in dict.fromkeys([*before, *now]) if name not in ("packages", schema.MORE)]
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names if before.get(name) != now.get(name)]


def examples_file(path: Path) -> Path:
    """The file of the examples of a baseline."""
    return path.with_name(f"{path.stem}.examples.jsonl")


def read(path: Path) -> Baseline | None:
    """The baseline at `path`; None if there is no such file.

    Raises BaselineError if one of both files cannot be read, has another schema version, or was edited.
    """
    try:
        if (raw := _bytes(path)) is None:
            return None
        what = f"the baseline {path}"
        plain = schema.parse(raw, what, AGAIN)
        schema.check_version(plain.get("schema") if isinstance(plain, dict) else None, SCHEMA, what, AGAIN)
        return _checked(path, schema.build(plain, BaselineFile, what, AGAIN), _scores(examples_file(path)))
    except DocumentError as error:
        raise BaselineError(str(error)) from error
    except UnicodeEncodeError as error:
        raise BaselineError(f"the baseline {path} holds a lone surrogate, which is never written. {AGAIN}.") from error


def write(path: Path, baseline: Baseline) -> None:
    """Replace both files, each in one move; the examples first, so that no summary exists without them."""
    scores = baseline.scores or {}
    lines: list[str] = []
    for (test, record), found in sorted(scores.items()):
        lines.append(json.dumps({**found.more, "test": test, "record": record, "columns": ["id", "group", *found.columns]}))
        lines += found.lines()
    with replacing(examples_file(path)) as new:
        new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    sums = {where: found.checksum for where, found in scores.items()}
    tests = {
        test: {name: sealed(entry, (test, name), sums.get((test, name), "")) for name, entry in records.items()}
        for test, records in baseline.tests.items()
    }
    document = schema.to_plain(structs.replace(baseline.file, tests=tests))
    with replacing(path) as new:
        new.write_text("\n".join(_lines(document)) + "\n", encoding="utf-8", newline="\n")


def contradictions(tests: Tests, scores: Examples) -> Iterator[str]:
    """Metrics that are impossible, or that the examples do not give, with test, record name and both numbers."""
    for test, record, entry in _entries(tests):
        examples = scores.get((test, record))
        for name, value in entry.metrics.items():
            where, exponential = f"in {test}, {record}, {name}", metric(name).exponential
            if exponential and min([value, *(value.interval or ())]) <= 0:
                yield f"{where} is {value!r}, and an exponential is above 0"
                continue
            if examples is None or value.n is None or (computed := examples.mean_of(name)) is None:
                continue
            mean, n = computed
            expected = math.log(value) if exponential else value
            if n != value.n or mean is None or not math.isclose(mean, expected, rel_tol=1e-5, abs_tol=1e-9):
                what = "nothing" if mean is None else f"{math.exp(min(mean, 700)) if exponential else mean:.7g}"
                yield f"{where} is {value:.7g} of {value.n:,}, but its examples give {what} of {n:,}"


def _bytes(path: Path) -> bytes | None:
    try:
        return regular(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BaselineError(f"{path} cannot be read ({error.strerror or error}). {AGAIN}.") from error


def _checked(path: Path, file: BaselineFile, scores: Examples | None) -> Baseline:
    edited = f"was damaged or edited by hand. {AGAIN}."
    for test, record in scores or {}:
        if record not in file.tests.get(test, {}):
            raise BaselineError(f"{examples_file(path)} has examples of {test}, {record}, but {path} does not: it {edited}")
    if scores is not None:
        sums = {where: found.checksum for where, found in scores.items()}
        for test, record, entry in _entries(file.tests):
            if entry.examples != sums.get((test, record), ""):
                what = f"the examples of {test}, {record} do not match their checksum in {path}"
                raise BaselineError(f"{examples_file(path)}: {what}. One of both {edited}")
    for problem in contradictions(file.tests, scores or {}):
        raise BaselineError(f"{path}: {problem}. It {edited}")
    for test, record, entry in _entries(file.tests):
        if sealed(entry, (test, record), entry.examples) != entry:
            raise BaselineError(f"{path}: {test}, {record} does not match its checksum. It {edited}")
    return Baseline(file, scores)


def _entries(tests: Tests) -> Iterator[tuple[str, str, Entry]]:
    return ((test, record, entry) for test, records in tests.items() for record, entry in records.items())


def _scores(path: Path) -> Examples | None:
    if (raw := _bytes(path)) is None:
        return None
    found: Examples = {}
    columns: list[list[Any]] = []
    example_type: Any = tuple[()]
    for number, line in enumerate(raw.splitlines(), start=1):
        what = f"{path}, line {number}"
        row = schema.parse(line, what, AGAIN)
        if isinstance(row, dict):
            head = schema.build(row, Head, what, AGAIN)
            if head.columns[:2] != ["id", "group"] or len(set(head.columns)) != len(head.columns):
                raise _no_example(what, line)
            ids, groups, *rest = columns = [[] for _ in head.columns]
            found[head.test, head.record] = Scores(ids, groups, dict(zip(head.columns[2:], rest, strict=True)), more=head.more)
            example_type = tuple.__class_getitem__((str, str | None, *[int | float | None] * len(rest)))
            continue
        try:
            values = msgspec.convert(row, example_type)
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
    """JSON with sorted keys; an object of plain values takes one line."""
    yield "{"
    for index, (key, part) in enumerate(sorted(value.items())):
        comma = "," if index < len(value) - 1 else ""
        if isinstance(part, dict) and any(isinstance(inner, dict) for inner in part.values()):
            first, *rest = _lines(part, indent + " ")
            yield f"{indent}{json.dumps(key)}: {first}"
            yield from rest[:-1]
            yield f"{indent}}}{comma}"
        else:
            yield f"{indent}{json.dumps(key)}: {json.dumps(part, sort_keys=True, allow_nan=False)}{comma}"
    yield "}"
