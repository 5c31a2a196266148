"""`lmeval slowest`: list the measurements of a run that took longest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".lmeval"), help="the output folder (.lmeval)")
    parser.add_argument("-n", type=int, default=10, metavar="N", help="how many to list (10)")


def main(arguments: argparse.Namespace) -> int:
    """Print them, and return the exit status."""
    records = json.loads((arguments.folder / "metrics.json").read_text(encoding="utf-8"))["records"]
    timed = [record for record in records if record["cost"]["seconds"] is not None]
    for record in sorted(timed, key=lambda record: -record["cost"]["seconds"])[: arguments.n]:
        print(f"{record['cost']['seconds']:10.2f} s  {record['test']}: {record['kind']} of {record['subject']}")
    return 0
