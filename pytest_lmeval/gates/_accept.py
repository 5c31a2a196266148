"""`lmeval baseline accept`: store the numbers of a run as the baseline of later runs."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import structs

from pytest_lmeval.errors import BaselineError, DocumentError
from pytest_lmeval.gates._baseline import Baseline, contradictions, examples_file, platform_of, read, write
from pytest_lmeval.gates._entry import entry_of, names_of, succeeding
from pytest_lmeval.gates._margins import parse
from pytest_lmeval.gates._pooled import Run, pooled
from pytest_lmeval.gates._scores import AGAIN, scores_of
from pytest_lmeval.records._document import NAME, RunDocument, load
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.report._terminal import say
from pytest_lmeval.report._words import number, one_line, safe_lines, wrapped
from pytest_lmeval.statistics._paired import detectable
from pytest_lmeval.statistics._verdict import LEVEL

Found = dict[str, dict[str, Run]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["accept"])
    parser.add_argument(
        "--from",
        dest="sources",
        type=Path,
        nargs="+",
        default=[Path(".lmeval")],
        metavar="FILE|DIR",
        help="metrics.json, or its folder; several runs of the same tests show how much chance changes",
    )
    parser.add_argument("--to", type=Path, default=Path("lmeval-baseline.json"), metavar="FILE", help="lmeval-baseline.json")
    parser.add_argument("-k", dest="pattern", default="", metavar="PATTERN", help="only tests that contain or match this")
    parser.add_argument("--prune", action="store_true", help="remove tests that are not in this run from the file")


def main(arguments: argparse.Namespace) -> int:
    """Store tests of a run in a baseline that keeps its other tests. Returns 0, or 2 if nothing can be accepted."""
    sources = [source / NAME if source.is_dir() else source for source in arguments.sources]
    try:
        runs, refused = [], set[str]()
        for source in sources:
            document = load(source)
            chosen = _matching(document.records, arguments.pattern)
            accepted, refused_here = _by_test(chosen)
            if not accepted:
                raise BaselineError(
                    f"{source} has nothing to accept: {_why(document, chosen, refused_here, arguments.pattern)}"
                )
            runs.append(_entries(accepted, source.parent))
            refused |= refused_here
        old = Baseline() if arguments.prune else read(arguments.to) or Baseline()
        found = _of_all_runs(runs, sources)
        new = _merged(old, found, document)
        for problem in contradictions(new.tests, new.scores or {}):
            where = ", ".join(map(str, sources))
            raise BaselineError(f"{where} cannot be accepted: {problem}. It was edited, or mixes several runs. {AGAIN}.")
        write(arguments.to, new)
    except DocumentError as error:
        print(safe_lines(str(error)), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{arguments.to} cannot be written ({error.strerror or error}). Name another file: --to FILE.", file=sys.stderr)
        return 2
    for test in sorted(found):
        say(f"accepted: {one_line(test)}")
        for text in _between_runs(found[test]):
            for line in wrapped(text, shutil.get_terminal_size().columns, indent=2):
                say(line)
    for test in sorted(refused - set(found)):
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


def _entries(accepted: dict[str, list[Record]], folder: Path) -> Found:
    """What a run has to accept."""
    return {
        test: {name: (entry_of(one), scores_of(one, folder)) for name, one in zip(names_of(records), records, strict=True)}
        for test, records in accepted.items()
    }


def _of_all_runs(runs: Sequence[Found], sources: Sequence[Path]) -> Found:
    """One entry for each record, of all runs. Raises BaselineError for a test that one of them lacks."""
    for run, source in zip(runs, sources, strict=True):
        for other, its_source in zip(runs, sources, strict=True):
            for test, records in run.items():
                if missing := [name for name in records if name not in other.get(test, {})]:
                    raise BaselineError(
                        f"{source} has {missing[0]} of {test}, and {its_source} does not: several runs are pooled where they "
                        f"measured the same. Choose with -k what all of them have, or leave {its_source} out."
                    )
    return {
        test: {name: pooled([run[test][name] for run in runs], f"{test}, {name},") for name in records}
        for test, records in runs[0].items()
    }


def _merged(old: Baseline, found: Found, document: RunDocument) -> Baseline:
    """The old baseline, with the new records of the accepted tests in place of the old ones."""
    tests = {test: entries for test, entries in old.tests.items() if test not in found}
    scores = {where: kept for where, kept in (old.scores or {}).items() if where[0] not in found}
    for test, records in found.items():
        tests[test] = {}
        for name, (entry, examples) in records.items():
            if entry.metrics or entry.costs or entry.verdict:
                tests[test][name] = succeeding(old.tests.get(test, {}).get(name), entry)
                if examples is not None:
                    scores[test, name] = examples
    return Baseline(structs.replace(old.file, environment=platform_of(document.environment), tests=tests), scores)


def _between_runs(records: dict[str, Run]) -> Iterator[str]:
    """How much chance changes the headline of each record, and what a gate can find beside it."""
    for entry, scores in records.values():
        name, metrics = entry.headline or "", entry.metrics
        if (spread := entry.between_runs.get(name)) is None or scores is None or name not in metrics:
            continue
        margin = parse(metric(name, metrics[name]).margin)
        least = detectable(math.sqrt(2) * spread, level=LEVEL, margin=margin.of(metrics[name]) if margin else 0.0)
        yield (
            f"{name} {number(metrics[name])} varies by {number(spread)} between runs (one standard deviation): a loss of "
            f"{number(least)} is found in 80 % of such runs, and {100 * LEVEL:g} % of those without one raise an alarm"
        )


def _why(document: RunDocument, chosen: Sequence[Record], refused: set[str], pattern: str) -> str:
    if refused:
        return f"{', '.join(sorted(refused))} failed for another reason than the baseline. Fix that first."
    if document.records and not chosen:
        tests = sorted({record.test for record in document.records})
        return f"no test in it matches {pattern!r}; it has {', '.join(tests)}."
    return "it holds no record. Run tests that use the fixture lmeval."
