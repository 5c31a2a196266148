"""Run a command: `lmeval COMMAND`, or `python -m pytest_lmeval COMMAND`.

A command is a module that is registered in the group `commands`: its docstring begins with a line of help, and it has
`add_arguments(parser)` and `main(arguments) -> exit status`. One with `PASSES_ON` gets all that follows its name, as it is
written, in `arguments.arguments`. Only the command that runs is imported.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_lmeval import registry
from pytest_lmeval.errors import LmevalError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 2 if it is refused, and the reason is printed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(given)
        sys.stdout.flush()
    except LmevalError as error:
        from pytest_lmeval.report._words import safe_lines

        print(safe_lines(str(error)), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _run(given: Sequence[str]) -> int:
    name = next((word for word in given if not word.startswith("-")), "")
    module: Any = registry.find("commands", name) if name else None
    parser = argparse.ArgumentParser(prog="lmeval", description="Work with the files that runs write.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("pytest-lmeval"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for entry in {entry.name: entry for entry in registry.entries("commands")}.values():
        text = _help(entry).replace("%", "%%")
        command = commands.add_parser(entry.name, help=text, description=text)
        if entry.name == name:
            module.add_arguments(command)
    if getattr(module, "PASSES_ON", False):
        return int(module.main(argparse.Namespace(arguments=given[given.index(name) + 1 :])))
    parsed = parser.parse_args(given or ["--help"])
    return int(module.main(parsed))


def _help(entry: registry.Entry) -> str:
    """The first line of the docstring, read from the file, since importing every command takes a second."""
    try:
        spec = importlib.util.find_spec(entry.target)
        source = Path(spec.origin).read_text(encoding="utf-8")  # type: ignore[union-attr, arg-type]
        text = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    except Exception:  # noqa: BLE001 - a broken package: running its command tells
        text = ""
    return re.sub("^`lmeval [^`]*`: ", "", text)


if __name__ == "__main__":
    sys.exit(main())
