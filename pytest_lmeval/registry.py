"""Find metrics, tasks, corpora, model sources, verbs, report sections, exporters and commands by name.

Each kind of thing is a group of entry points. This package registers its own there, as any other may:

    [project.entry-points."pytest_lmeval.metrics"]
    brevity = "my_package:BREVITY"

    [project.entry-points."pytest_lmeval.tasks"]
    greetings = "my_package:TASKS"

An entry point leads to the thing of its name, or to a family: a mapping from names to things, under a name in capitals. A
family may give a thing as text, "module:attribute". Nothing is imported before it is needed; a family is, when its names are.

A name may go on behind a colon: `text:notes.txt` is found as `text`, which is given the rest. Standard library only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pytest_lmeval.errors import RegistryError, nearest, no_such

__all__ = [
    "GROUPS",
    "Entry",
    "PluginWarning",
    "entries",
    "find",
    "names",
]

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
LISTED = 30  # names of one family that a message lists


class PluginWarning(UserWarning):
    """Another package registers something that cannot be imported or is not allowed; the run goes on without it."""


@dataclass(frozen=True)
class Entry:
    """What a package registers.

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

    @property
    def may_be_family(self) -> bool:
        """Whether its target is in capitals. What is not is imported by its own name only, since it holds no others."""
        return self.target.rpartition(":")[2].isupper()

    def load(self) -> Any:
        """The thing, or the family. Raises whatever importing it raises, and TypeError for a family that is not in capitals, or
        whose names are no texts."""
        thing = importlib.metadata.EntryPoint(self.name, self.target, self.group).load()
        if isinstance(thing, Mapping) and not self.may_be_family:
            raise TypeError(f"{self.target} is a mapping, and only one in capitals is looked into")
        if isinstance(thing, Mapping) and (wrong := [name for name in thing if not isinstance(name, str)]):
            raise TypeError(f"{self.target} is a family, whose names are texts, and holds {wrong[0]!r}")
        return thing


@functools.cache
def entries(group: str) -> tuple[Entry, ...]:
    """All that is registered in a group: this package's first, then by package and name. Imports nothing.

    Raises RegistryError for a group that is none.
    """
    if group not in GROUPS:
        raise RegistryError(no_such("group", group, GROUPS))
    found = {
        Entry(group, point.name, point.value, point.dist.name if point.dist else "unknown")
        for point in _installed().select(group=f"pytest_lmeval.{group}")
    }
    return tuple(sorted(found, key=lambda entry: (not entry.is_own, entry.package, entry.name)))


def find(group: str, name: str) -> Any:
    """What is registered by this name. Raises RegistryError if nothing is, with the nearest name, or if several packages do.

    Imports the entries of this very name, and families.
    """
    if (found := _found(group, name)) is None:
        raise unknown(group, name)
    return found


def resolve(group: str, name: str) -> tuple[Any, str | None] | None:
    """What is registered by the whole name, and None; or by what stands before its first colon, and the rest; or None.

    Raises RegistryError if several packages register it. Imports no more than `find`.
    """
    head, colon, rest = name.partition(":")
    for key, given in ((name, None), (head, rest)) if colon else ((name, None),):
        if (found := _found(group, key)) is not None:
            return found, given
    return None


def names(group: str, pattern: str = "*") -> list[str]:
    """The names of a group that match the pattern, those of families among them. Imports families only."""
    return [name for entry in entries(group) for name in _members(entry) if fnmatchcase(name, pattern)]


def things(group: str, pattern: str = "*") -> Iterator[tuple[str, Any, Entry]]:
    """Name, thing and origin of all in a group whose name matches and that can be imported. Two may have the same name."""
    for entry in entries(group):
        for name in _members(entry):
            if fnmatchcase(name, pattern) and (thing := _member(entry, name)) is not None:
                yield name, thing, entry


def ambiguous(group: str, name: str) -> RegistryError:
    """The error for a name that several packages register."""
    registered = " and by ".join(str(entry) for entry, _ in _registered(group, name))
    return RegistryError(
        f"the {GROUPS[group]} {name!r} is registered by {registered}. Which one is meant cannot be known: remove one of the "
        "packages, or rename one of the two."
    )


def unknown(group: str, name: str, also: str = "") -> RegistryError:
    """The error for a name that nothing is registered by: it tells the nearest name, and all that there are.

    also  what else may be named, for the end of that list
    """
    head = name.partition(":")[0]
    others = [entry for entry in entries(group) if entry.name in (name, head) and not entry.is_own]
    if broken := [entry for entry in others if _loaded(entry) is None]:
        return RegistryError(
            f"the {GROUPS[group]} {name!r} is registered by {broken[0]}, which cannot be imported: see the warning above. "
            "Repair or remove that package."
        )
    known = names(group)
    families = [(entry.name, list(_members(entry))) for entry in entries(group)]
    listed = [
        f"{members[0]} and {len(members) - 1} more of {family}" if len(members) > LISTED else ", ".join(members)
        for family, members in families
        if members
    ]
    near = nearest(name, known) or nearest(head, known)
    return RegistryError(f"there is no {GROUPS[group]} {name!r}.{near} There are: {', '.join(listed)}{also}.")


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of the options that the function has a parameter for, by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions that are written in C
        return {}
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = {parameter.name for parameter in parameters if parameter.kind in kinds}
    return {name: value for name, value in options.items() if name in taken}


@functools.cache
def _installed() -> Any:
    """The entry points of all installed packages: reading them takes milliseconds."""
    return importlib.metadata.entry_points()


def _found(group: str, name: str) -> Any:
    """The thing of this name, None if there is none. Raises RegistryError if there are several."""
    found = _registered(group, name)
    if len(found) > 1:
        raise ambiguous(group, name)
    return found[0][1] if found else None


def _registered(group: str, name: str) -> list[tuple[Entry, Any]]:
    """All that is registered by this name and can be imported."""
    holding = [entry for entry in entries(group) if (entry.name == name or entry.may_be_family) and name in _members(entry)]
    return [(entry, thing) for entry in holding if (thing := _member(entry, name)) is not None]


def _members(entry: Entry) -> Mapping[str, Any]:
    """The names that an entry holds, with their things; a thing that is no family is not imported for its name."""
    if not entry.may_be_family:
        return {entry.name: None}
    thing = _loaded(entry)
    if isinstance(thing, Mapping):
        return thing
    return {} if thing is None else {entry.name: thing}


def _member(entry: Entry, name: str) -> Any:
    """The thing of this name in an entry that holds it; None if it cannot be imported."""
    if not entry.may_be_family:
        return _loaded(entry)
    thing = _members(entry)[name]
    return _loaded(Entry(entry.group, name, thing, entry.package)) if isinstance(thing, str) else thing


@functools.cache
def _loaded(entry: Entry) -> Any:
    """What the entry leads to; None, and one warning, if another package's cannot be imported."""
    try:
        return entry.load()
    except Exception as error:
        if entry.is_own:
            raise
        with warnings.catch_warnings():
            warnings.simplefilter("always", PluginWarning)  # where warnings are errors, too: the run goes on without it
            warnings.warn(
                f"{entry.package} registers the {GROUPS[entry.group]} {entry.name!r} as {entry.target}, which cannot be "
                f"imported ({type(error).__name__}: {error}). The run goes on without it; repair or remove that package.",
                PluginWarning,
                stacklevel=2,
            )
        return None
