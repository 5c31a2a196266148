"""The file that a run is compared with, and the file of examples beside it. Both are meant to be committed, and read in a diff.

    baseline.json             schema, environment, and of each test each record: a metric a line
    baseline.examples.jsonl   of each record a line of its columns, and below it a line for each example

Sorted keys, rounded numbers, no paths, no times: a run that changed nothing writes the same bytes. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import BaselineError
from pytest_lmeval.gates.damage import contradictions, is_number, problems
from pytest_lmeval.gates.scores import Scores
from pytest_lmeval.records.replacing import replacing

SCHEMA = 1
AGAIN = "python -m pytest_lmeval baseline accept"
ENVIRONMENT = ("python", "device", "cpu", "threads", "packages")


@dataclass(frozen=True)
class Baseline:
    """tests    test -> name of a record -> entry (see `entry.entry_of`)
    scores   (test, name of a record) -> scores; None where the file of examples is missing
    """

    environment: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    scores: dict[tuple[str, str], Scores] | None = field(default_factory=dict)


def examples_file(path: Path) -> Path:
    """Where the examples of a baseline stand.

    >>> str(examples_file(Path("reports/baseline.json")))
    'reports/baseline.examples.jsonl'
    """
    return path.with_suffix("").with_name(f"{path.with_suffix('').name}.examples.jsonl")


def read(path: Path) -> Baseline | None:
    """The baseline at `path`; None if there is no such file. Raises BaselineError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BaselineError(f"the baseline {path} cannot be read ({error}).") from error
    document = _parsed(path, text, 1)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise BaselineError(
            f"the baseline {path} is of schema {found!r}, and this version of pytest-lmeval reads schema {SCHEMA}. Its numbers "
            f"may mean something else. Install the version that wrote it, or write it anew: delete it, run the tests, {AGAIN}."
        )
    for place, problem in problems(document):
        where = f"the baseline {path} was damaged: {' > '.join(place)} {problem}"
        raise BaselineError(f"{where}. Restore it, or write it anew: {AGAIN}.")
    scores = _read_scores(examples_file(path))
    for test, record, problem in contradictions(document["tests"], scores or {}):
        raise BaselineError(
            f"the baseline {path} and {examples_file(path)} do not fit together: of {test}, {record}, {problem}. One "
            f"of them was cut off, edited, or restored without the other. Restore both, or write them anew: {AGAIN}."
        )
    return Baseline(document["environment"], document["tests"], scores)


def write(path: Path, baseline: Baseline) -> None:
    """Write both files, each in one move; the examples first, so that no summary stands without them."""
    lines: list[str] = []
    for (test, record), scores in sorted((baseline.scores or {}).items()):
        lines.append(json.dumps({"test": test, "record": record, "columns": ["id", "group", *scores.columns]}))
        rows = zip(scores.ids, scores.groups, *scores.columns.values(), strict=True)
        lines += [json.dumps(row, separators=(",", ":"), allow_nan=False) for row in rows]
    with replacing(examples_file(path)) as new:
        new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    document = {"schema": SCHEMA, "environment": baseline.environment, "tests": baseline.tests}
    with replacing(path) as new:
        new.write_text("\n".join(_lines(document)) + "\n", encoding="utf-8", newline="\n")


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


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise BaselineError(f"{path} is nested more deeply than any baseline. Restore it, or write it anew: {AGAIN}.") from None
    except ValueError as error:
        at = f"line {getattr(error, 'lineno', 1) + line - 1}, column {getattr(error, 'colno', 1)}"
        raise BaselineError(
            f"{path} is no JSON: {getattr(error, 'msg', error)} at {at}. It was cut off, edited by hand, or a merge left its "
            f"marks. Restore it, or write it anew: {AGAIN}."
        ) from error


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _read_scores(path: Path) -> dict[tuple[str, str], Scores] | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BaselineError(f"the examples {path} cannot be read ({error}).") from error
    found: dict[tuple[str, str], Scores] = {}
    columns: list[list[Any]] | None = None
    for number, line in enumerate(lines, start=1):
        row = _parsed(path, line, number)
        if _is_head(row):
            columns = [[] for _ in row["columns"]]
            ids, groups, *rest = columns
            found[row["test"], row["record"]] = Scores(ids, groups, dict(zip(row["columns"][2:], rest, strict=True)))
        elif columns is not None and isinstance(row, list) and len(row) == len(columns) and _is_example(row):
            for column, value in zip(columns, row, strict=True):
                column.append(value)
        else:
            raise BaselineError(
                f"{path}, line {number} is {line[:60]!r}: neither the head of a record nor an example of the one above. "
                f"Restore the file, or write it anew: {AGAIN}."
            )
    return found


def _is_head(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(columns := row.get("columns"), list):
        return False
    texts = all(isinstance(text, str) for text in (row.get("test"), row.get("record"), *columns))
    return texts and columns[:2] == ["id", "group"] and len(set(columns)) == len(columns)


def _is_example(row: list[Any]) -> bool:
    numbers = all(value is None or is_number(value) for value in row[2:])
    return isinstance(row[0], str) and isinstance(row[1], str | None) and numbers
