"""`python -m pytest_lmeval COMMAND`: what can be done with the files that runs leave behind.

Each command is a module with `add_arguments(parser)` and `main(arguments) -> exit status`, imported when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {  # name -> module, help
    "render": ("pytest_lmeval.report.render", "render the pages of a run from its metrics.json, or what a service reads"),
    "compare": ("pytest_lmeval.report.compare", "show several runs side by side"),
    "history": ("pytest_lmeval.report.history", "how every number has moved over the runs in a folder"),
    "baseline": ("pytest_lmeval.gates.accept", "accept the numbers of a run as those that later runs are compared with"),
    "compare-runs": ("pytest_lmeval.gates.compare_runs", "is this version slower than another? Both are run, in turns"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 where it could not be done."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m pytest_lmeval", description="Files of pytest-lmeval runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in given[:1]:
            importlib.import_module(module).add_arguments(command)
    parsed = parser.parse_args(given)
    status: int = importlib.import_module(COMMANDS[parsed.command][0]).main(parsed)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # what reads on, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
