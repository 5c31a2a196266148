"""`lmeval list`: list what this and other packages register: metrics, tasks, corpora, models, verbs, ..."""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
from fnmatch import fnmatchcase
from typing import Any

from pytest_lmeval import registry
from pytest_lmeval.errors import RegistryError, no_such
from pytest_lmeval.records._metric import Metric
from pytest_lmeval.report._terminal import say

PREFIX = "lm_eval:"  # of the tasks of another harness, whose names are looked up only if they are asked for
DIRECTIONS = {True: "higher is better", False: "lower is better", None: ""}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", help=f"{', '.join(registry.GROUPS)}; without one, how many each has")
    parser.add_argument("pattern", nargs="?", default="*", help="only names that match it, e.g. 'acc*'")


def main(options: argparse.Namespace) -> int:
    """Print the groups, or a line for each thing in one. Returns 1 if no name matches; raises RegistryError."""
    if options.group is None:
        rows = [[group, str(len(registry.names(group)))] for group in registry.GROUPS]
    elif options.group in registry.GROUPS:
        rows = listed(options.group, options.pattern)
    else:
        raise RegistryError(no_such("group", options.group, registry.GROUPS))
    if not rows:
        print(f"no {registry.GROUPS[options.group]} is called {options.pattern!r}.", file=sys.stderr)
        return 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def listed(group: str, pattern: str = "*") -> list[list[str]]:
    """A row for each thing whose name matches: name, description, and the package unless it is this one."""
    if group == "tasks" and pattern.startswith(PREFIX):
        from pytest_lmeval.lm_eval._names import listed as of_lm_eval

        return [[name, about] for name, about in of_lm_eval() if fnmatchcase(name, pattern)]
    found = registry.things(group, pattern)
    return [[name, *described(thing), "" if entry.is_own else entry.package] for name, thing, entry in found]


def described(thing: Any) -> list[str]:
    """Unit, direction, aspect and definition of a metric; of another thing its `about`, its docstring, or its class."""
    if isinstance(thing, Metric):
        return [thing.unit, DIRECTIONS[thing.higher_is_better], thing.aspect, thing.about]
    thing = thing.func if isinstance(thing, functools.partial) else thing
    documented = inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isroutine(thing)
    text = getattr(thing, "about", "") or (inspect.getdoc(thing) if documented else "") or type(thing).__name__
    line, paragraph = str(text).partition("\n")[0], " ".join(str(text).partition("\n\n")[0].split())
    whole = line if line.endswith(".") else re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]  # never half a sentence
    return [re.sub(r" \(see `[^)]*\)", "", whole)]
