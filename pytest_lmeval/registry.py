"""Find by name: metrics, tasks, corpora, model sources, verbs, report sections, exporters and commands.

Each kind of thing is a group of entry points. This package registers its own there, as any other may:

    [project.entry-points."pytest_lmeval.metrics"]
    brevity = "my_package:BREVITY"

What an entry point leads to is imported when it is asked for. It is the thing of that name, or a mapping from names to things
(a family: the tasks of a benchmark, the models of a zoo). Standard library only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pytest_lmeval.errors import RegistryError, nearest

__all__ = ["GROUPS", "Entry", "PluginWarning", "entries", "find", "names", "scheme"]

OWN = "pytest-lmeval"
GROUPS = {  # group -> what one of its things is called in messages
    "metrics": "metric",
    "tasks": "task",
    "corpora": "corpus",
    "models": "model source",
    "verbs": "verb",
    "reports": "report section",
    "exporters": "export format",
    "commands": "command",
}


class PluginWarning(UserWarning):
    """A package that registers something here, and cannot be imported: the run goes on without it."""


@dataclass(frozen=True)
class Entry:
    """What a package has registered.

    name     by which it is found; of a family, the family's
    target   "module:attribute"
    package  the distribution that registers it
    """

    group: str
    name: str
    target: str
    package: str

    def __str__(self) -> str:
        return f"{self.package} ({self.target})"

    @property
    def is_own(self) -> bool:
        return self.package == OWN

    def load(self) -> Any:
        """The thing, or the family. Raises whatever importing it raises."""
        return importlib.metadata.EntryPoint(self.name, self.target, self.group).load()


@functools.cache
def entries(group: str) -> tuple[Entry, ...]:
    """All that is registered in a group: this package's first, then by package and name. Nothing is imported for that."""
    found = {
        Entry(group, point.name, point.value, point.dist.name if point.dist else "unknown")
        for point in importlib.metadata.entry_points(group=f"pytest_lmeval.{group}")
    }
    return tuple(sorted(found, key=lambda entry: (not entry.is_own, entry.package, entry.name)))


def find(group: str, name: str) -> Any:
    """What is registered by this name. Raises RegistryError where nothing is, or more than one thing; it names the nearest.

    Only what may hold the name is imported: entries of that very name, families of this package, and only where these do not
    have it, families of others.
    """
    exact = [entry for entry in entries(group) if entry.name == name]
    others = [entry for entry in entries(group) if entry.name != name]
    families = (entry for entry in others if entry.is_own)
    found = [*_holding(exact, name), *_holding(families, name)] or [*_holding((e for e in others if not e.is_own), name)]
    if len(found) > 1:
        both = " and by ".join(str(entry) for entry, _ in found)
        raise RegistryError(
            f"the {GROUPS[group]} {name!r} is registered by {both}. Which is meant cannot be known: remove one of the packages, "
            "or give one of the two another name."
        )
    if not found:
        known = names(group)
        listed = ", ".join(known if len(known) <= 30 else [*known[:30], f"and {len(known) - 30} more (lmeval list {group})"])
        raise RegistryError(f"there is no {GROUPS[group]} {name!r}.{nearest(name, known)} There are: {listed}.")
    return found[0][1]


def names(group: str, pattern: str = "*") -> list[str]:
    """The names of all things of a group that match the pattern, families taken apart. Imports all of them."""
    return [name for name, _, _ in things(group) if fnmatchcase(name, pattern)]


def things(group: str) -> Iterator[tuple[str, Any, Entry]]:
    """Name, thing and origin of all that is registered in a group, and can be imported."""
    for entry in entries(group):
        thing = _loaded(entry)
        if isinstance(thing, Mapping):
            yield from ((name, member, entry) for name, member in thing.items())
        elif thing is not None:
            yield entry.name, thing, entry


def scheme(name: str) -> tuple[str, str]:
    """What a name begins with, and what follows the colon: `text:notes.txt` is the file notes.txt, as the source `text` has it.

    >>> scheme("text:notes.txt"), scheme("stdlib")
    (('text', 'notes.txt'), ('stdlib', ''))
    """
    head, _, rest = name.partition(":")
    return head, rest


def _holding(candidates: Any, name: str) -> Iterator[tuple[Entry, Any]]:
    """The entries that have a thing of this name, each with it."""
    for entry in candidates:
        thing = _loaded(entry)
        if isinstance(thing, Mapping):
            if name in thing:
                yield entry, thing[name]
        elif thing is not None and entry.name == name:
            yield entry, thing


@functools.cache
def _loaded(entry: Entry) -> Any:
    """What the entry leads to; None where another package cannot be imported, which is said once."""
    try:
        return entry.load()
    except Exception as error:
        if entry.is_own:
            raise
        with warnings.catch_warnings():
            warnings.simplefilter("always", PluginWarning)  # also where warnings are errors: the run goes on without it
            warnings.warn(
                f"{entry.package} registers the {GROUPS[entry.group]} {entry.name!r}, and cannot be imported "
                f"({type(error).__name__}: {error}). This run goes on without it; repair or remove that package.",
                PluginWarning,
                stacklevel=4,
            )
        return None
