"""`lmeval history`: how every number has moved over the runs in a folder."""

from __future__ import annotations

import argparse
import sys
from dataclasses import astuple
from fnmatch import fnmatchcase
from pathlib import Path

from pytest_lmeval.errors import DocumentError, nearest
from pytest_lmeval.records import _history as history
from pytest_lmeval.records._document import RunDocument, Section
from pytest_lmeval.records._metric import metric
from pytest_lmeval.report._tables import headlines
from pytest_lmeval.report._terminal import say
from pytest_lmeval.report._words import number, one_line

COLUMNS = ["runs", "last", "mean", "min", "max"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".lmeval"), help="the output folder (.lmeval)")
    parser.add_argument("--metric", metavar="PATTERN", default="*", help="only metrics of such a name, e.g. 'itl*'")
    parser.add_argument("-k", dest="test", metavar="TEXT", default="", help="only tests whose name contains this")


def main(options: argparse.Namespace) -> int:
    """Print a table for each test. Raises DocumentError if there is nothing to show."""
    read, notes = history.read(options.folder)
    for note in notes:
        print(note, file=sys.stderr)
    chosen = [line for line in read if options.test in line.test and fnmatchcase(line.metric, options.metric)]
    if not chosen:
        near = nearest(options.metric, {line.metric for line in read})
        raise DocumentError(f"{options.folder / history.NAME} holds no matching number among {len(read)} lines.{near}")
    units = {line.key: line.unit for line in chosen}
    heading = None
    for key, found in history.statistics(chosen).items():
        if heading != (heading := key[:3]):
            say("\n".join(["", one_line(", ".join(heading)), _row(["metric", *COLUMNS])]))
        values = (number(value, units[key]) for value in (found.last, found.mean, found.min, found.max))
        say(_row([key[3], str(found.runs), *values]))
    return 0


def _row(cells: list[str]) -> str:
    return ("    " + one_line(cells[0]).ljust(32) + cells[1].rjust(5) + "".join(cell.rjust(20) for cell in cells[2:])).rstrip()


def section(document: RunDocument, folder: Path | None) -> Section | None:
    """Statistics of the headline numbers over the runs in the folder; None if no other run measured one of them."""
    lines = history.read(folder)[0] if folder else []
    found = history.statistics(lines)
    rows = []
    for record in document.records:
        for name in headlines(record):
            over = found.get((record.test, record.lm.spec, record.subject, name))
            if over and over.runs > 1:
                value = record.metrics[name]
                label = metric(name, value).label + (f" ({value.unit})" if value.unit else "")
                rows.append([record.test, f"{record.lm.spec}, {record.subject}", label, *astuple(over)])
    return Section("Over the runs in this folder", columns=["test", "on", "metric", *COLUMNS], rows=rows) if rows else None
