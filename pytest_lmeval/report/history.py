"""`python -m pytest_lmeval history`: how every number has moved over the runs in a folder."""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from pytest_lmeval.records import history
from pytest_lmeval.report.render import say
from pytest_lmeval.report.words import number

COLUMNS = ["metric", "runs", "last", "mean", "min", "max"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".lmeval"), help="the output folder (.lmeval)")
    parser.add_argument("--metric", metavar="PATTERN", default="*", help="only metrics of such a name, e.g. 'itl*'")
    parser.add_argument("-k", dest="test", metavar="TEXT", default="", help="only tests whose name contains this")


def main(options: argparse.Namespace) -> int:
    """Print a table for each test. Returns the exit status: 2 where there is nothing to show."""
    read, notes = history.read(options.folder)
    chosen = [line for line in read if options.test in line["test"] and fnmatchcase(line["metric"], options.metric)]
    for note in notes:
        print(note, file=sys.stderr)
    if not chosen:
        print(f"{options.folder / history.NAME} holds no such number: {len(read)} lines were read.", file=sys.stderr)
        return 2
    units = {(line["test"], line["lm"], line["subject"], line["metric"]): line.get("unit", "") for line in chosen}
    heading = None
    for (test, lm, subject, metric), found in history.statistics(chosen).items():
        if heading != (heading := (test, lm, subject)):
            say("\n".join(["", f"{test}, {lm}, {subject}", _row(COLUMNS)]))
        unit = units[test, lm, subject, metric]
        say(
            _row([metric, str(found.count), *(number(value, unit) for value in (found.last, found.mean, found.min, found.max))])
        )
    return 0


def _row(cells: list[str]) -> str:
    return ("    " + cells[0].ljust(32) + cells[1].rjust(5) + "".join(cell.rjust(20) for cell in cells[2:])).rstrip()
