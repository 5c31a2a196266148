"""`python -m pytest_lmeval baseline accept`: the numbers of a run become those that later runs are compared with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import BaselineError, DocumentError
from pytest_lmeval.gates.baseline import ENVIRONMENT, Baseline, examples_file, read, write
from pytest_lmeval.gates.damage import RECORD, contradictions, problems, unlike
from pytest_lmeval.gates.entry import entry_of, names_of
from pytest_lmeval.gates.scores import Scores, scores_of
from pytest_lmeval.report.document import load

AGAIN = "Run the tests again, and accept that run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["accept"])
    parser.add_argument(
        "--from", dest="source", type=Path, default=Path(".lmeval"), metavar="FILE|DIR", help="metrics.json, or its folder"
    )
    parser.add_argument("--to", type=Path, default=Path("lmeval-baseline.json"), metavar="FILE", help="lmeval-baseline.json")
    parser.add_argument("-k", dest="pattern", default="", metavar="PATTERN", help="only tests that contain or match this")
    parser.add_argument("--prune", action="store_true", help="forget the tests that are not in this run")


def main(arguments: argparse.Namespace) -> int:
    """Take the tests of a run into a baseline; those of others stay. Returns 0, or 2 where nothing could be accepted."""
    source = arguments.source / "metrics.json" if arguments.source.is_dir() else arguments.source
    try:
        document = read_metrics(arguments.source)
        chosen = matching(document["records"], arguments.pattern)
        accepted, refused = by_test(chosen)
        if not accepted:
            raise BaselineError(f"{source} has nothing to accept: {_why(document, chosen, refused, arguments.pattern)}")
        old = Baseline() if arguments.prune else read(arguments.to) or Baseline()
        new = merged(old, accepted, document["environment"], source.parent)
        for problem in _unfit(new):
            raise BaselineError(f"{source} cannot be accepted: {problem}. It was edited, or is of several runs: {AGAIN}")
        write(arguments.to, new)
    except BaselineError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{arguments.to} cannot be written ({error.strerror or error}). Name another file: --to FILE.", file=sys.stderr)
        return 2
    for test in sorted(accepted):
        print(f"accepted: {test}")
    for test in sorted(refused):
        print(f"not accepted: {test} (it failed, and not for its baseline)")
    print(f"written to {arguments.to} and {examples_file(arguments.to)}: commit both")
    return 0


def read_metrics(path: Path) -> dict[str, Any]:
    """The metrics.json of a run, or of its folder. Raises BaselineError where there is none, or not all of it can be read."""
    try:
        document = load(path)
    except DocumentError as error:
        raise BaselineError(str(error)) from error
    except RecursionError:
        raise BaselineError(f"{path} is nested more deeply than any metrics.json. {AGAIN}") from None
    damaged = list(document["problems"])
    for number, record in enumerate(document["records"], start=1):
        damaged += [
            f"{' > '.join(place)} {what}" for place, what in unlike({"gate": None, **record}, RECORD, [f"record {number}"])
        ]
    if damaged:
        raise BaselineError(f"{path} was damaged, so nothing of it is accepted: {damaged[0]}. {AGAIN}")
    return document


def _unfit(baseline: Baseline) -> Iterator[str]:
    """What a later run could not be compared with."""
    for place, what in problems({"environment": baseline.environment, "tests": baseline.tests}):
        yield f"{' > '.join(place)} {what}"
    for test, record, what in contradictions(baseline.tests, baseline.scores or {}):
        yield f"of {test}, {record}, {what}"


def matching(records: list[dict[str, Any]], pattern: str) -> list[dict[str, Any]]:
    """The records of the test of this very name; if there is none, of those whose name contains the pattern, or matches it."""
    exact = [record for record in records if record["test"] == pattern]
    return exact or [record for record in records if pattern in record["test"] or fnmatchcase(record["test"], pattern)]


def by_test(records: list[dict[str, Any]]) -> tuple[dict[str, list[dict[str, Any]]], set[str]]:
    """The records of each test that may be accepted, and the tests that may not: they failed by an assertion of their own."""
    tests: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        tests.setdefault(record["test"], []).append(record)
    refused = {test for test, found in tests.items() if any(map(_failed, found)) and not any(map(_failed_for_baseline, found))}
    return {test: found for test, found in tests.items() if test not in refused}, refused


def merged(old: Baseline, accepted: dict[str, list[dict[str, Any]]], environment: dict[str, Any], folder: Path) -> Baseline:
    """The baseline with the records of these tests in place of those that it had of them."""
    tests = {test: entries for test, entries in old.tests.items() if test not in accepted}
    scores: dict[tuple[str, str], Scores] = {key: found for key, found in (old.scores or {}).items() if key[0] not in accepted}
    for test, records in accepted.items():
        tests[test] = {}
        for name, record in zip(names_of(records), records, strict=True):
            entry = entry_of(record)
            if entry["metrics"] or entry["costs"] or entry["verdict"]:
                tests[test][name] = entry
            if (found := _scores(record, folder)) is not None:
                scores[test, name] = found
    return Baseline({name: environment.get(name) for name in ENVIRONMENT}, tests, scores)


def _scores(record: dict[str, Any], folder: Path) -> Scores | None:
    try:
        return scores_of(record, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise BaselineError(f"the examples of {record['test']} in {folder} cannot be read ({what}). {AGAIN}") from error


def _failed(record: dict[str, Any]) -> bool:
    return record.get("outcome") == "failed"


def _failed_for_baseline(record: dict[str, Any]) -> bool:
    return any(isinstance(row, dict) and row.get("failed") is True for row in (record.get("gate") or {}).values())


def _why(document: dict[str, Any], chosen: list[Any], refused: set[str], pattern: str) -> str:
    if refused:
        return f"{', '.join(sorted(refused))} failed, and not for the baseline. Mend that first."
    if document["records"] and not chosen:
        tests = sorted({record["test"] for record in document["records"]})
        return f"no test in it matches {pattern!r}; it has {', '.join(tests)}."
    return "it holds no record. Run tests that use the fixture lmeval."
