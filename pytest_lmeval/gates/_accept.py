"""`lmeval baseline accept`: store the numbers of a run as the baseline of later runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import structs

from pytest_lmeval.errors import BaselineError, DocumentError
from pytest_lmeval.gates._baseline import Baseline, contradictions, examples_file, platform_of, read, write
from pytest_lmeval.gates._entry import entry_of, names_of, succeeding
from pytest_lmeval.gates._scores import AGAIN, scores_of
from pytest_lmeval.records._document import NAME, RunDocument, load
from pytest_lmeval.records._measured import Record
from pytest_lmeval.report._terminal import say
from pytest_lmeval.report._words import one_line, safe_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["accept"])
    parser.add_argument(
        "--from", dest="source", type=Path, default=Path(".lmeval"), metavar="FILE|DIR", help="metrics.json, or its folder"
    )
    parser.add_argument("--to", type=Path, default=Path("lmeval-baseline.json"), metavar="FILE", help="lmeval-baseline.json")
    parser.add_argument("-k", dest="pattern", default="", metavar="PATTERN", help="only tests that contain or match this")
    parser.add_argument("--prune", action="store_true", help="remove tests that are not in this run from the file")


def main(arguments: argparse.Namespace) -> int:
    """Store tests of a run in a baseline that keeps its other tests. Returns 0, or 2 if nothing can be accepted."""
    source = arguments.source / NAME if arguments.source.is_dir() else arguments.source
    try:
        document = load(source)
        chosen = _matching(document.records, arguments.pattern)
        accepted, refused = _by_test(chosen)
        if not accepted:
            raise BaselineError(f"{source} has nothing to accept: {_why(document, chosen, refused, arguments.pattern)}")
        old = Baseline() if arguments.prune else read(arguments.to) or Baseline()
        new = _merged(old, accepted, document, source.parent)
        for problem in contradictions(new.tests, new.scores or {}):
            raise BaselineError(f"{source} cannot be accepted: {problem}. It was edited, or mixes several runs. {AGAIN}.")
        write(arguments.to, new)
    except DocumentError as error:
        print(safe_lines(str(error)), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{arguments.to} cannot be written ({error.strerror or error}). Name another file: --to FILE.", file=sys.stderr)
        return 2
    for test in sorted(accepted):
        say(f"accepted: {one_line(test)}")
    for test in sorted(refused):
        say(f"not accepted: {one_line(test)} (it failed for another reason than its baseline)")
    print(f"written to {arguments.to} and {examples_file(arguments.to)}: commit both")
    return 0


def _matching(records: Sequence[Record], pattern: str) -> list[Record]:
    """The records of the test of exactly this name; if there is none, of those whose name contains or matches it."""
    exact = [record for record in records if record.test == pattern]
    return exact or [record for record in records if pattern in record.test or fnmatchcase(record.test, pattern)]


def _by_test(records: Sequence[Record]) -> tuple[dict[str, list[Record]], set[str]]:
    """The records of each test that may be accepted, and the tests that may not, since they failed by themselves."""
    tests: dict[str, list[Record]] = {}
    for record in records:
        tests.setdefault(record.test, []).append(record)
    failed = {record.test for record in records if record.outcome == "failed"}
    refused = failed - {record.test for record in records for row in (record.gate or {}).values() if row.failed}
    return {test: found for test, found in tests.items() if test not in refused}, refused


def _merged(old: Baseline, accepted: dict[str, list[Record]], document: RunDocument, folder: Path) -> Baseline:
    """The old baseline, with the new records of the accepted tests in place of the old ones."""
    tests = {test: entries for test, entries in old.tests.items() if test not in accepted}
    scores = {where: found for where, found in (old.scores or {}).items() if where[0] not in accepted}
    for test, records in accepted.items():
        tests[test] = {}
        for name, record in zip(names_of(records), records, strict=True):
            entry = entry_of(record)
            if entry.metrics or entry.costs or entry.verdict:
                tests[test][name] = succeeding(old.tests.get(test, {}).get(name), entry)
                if (found := scores_of(record, folder)) is not None:
                    scores[test, name] = found
    return Baseline(structs.replace(old.file, environment=platform_of(document.environment), tests=tests), scores)


def _why(document: RunDocument, chosen: Sequence[Record], refused: set[str], pattern: str) -> str:
    if refused:
        return f"{', '.join(sorted(refused))} failed for another reason than the baseline. Fix that first."
    if document.records and not chosen:
        tests = sorted({record.test for record in document.records})
        return f"no test in it matches {pattern!r}; it has {', '.join(tests)}."
    return "it holds no record. Run tests that use the fixture lmeval."
