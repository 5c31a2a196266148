"""`lmeval slowest`: list the measurements of a run that took longest."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_lmeval.records import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".lmeval"), help="the output folder (.lmeval)")
    parser.add_argument("-n", type=int, default=10, metavar="N", help="how many to list (10)")


def main(arguments: argparse.Namespace) -> int:
    """Print them, and return the exit status. A folder without a run is a DocumentError, whose message `lmeval` prints."""
    timed = [(record.cost.seconds, record) for record in load(arguments.folder).records if record.cost.seconds is not None]
    for seconds, record in sorted(timed, key=lambda pair: -pair[0])[: arguments.n]:
        print(f"{seconds:10.2f} s  {record.test}: {record.kind} of {record.subject}")
    return 0
