"""Find metrics, tasks, corpora, model sources, verbs, report sections, exporters and commands by name.

Each kind of thing is a group of entry points, "pytest_lmeval.GROUP": this package registers its own there, as any other may. An
entry point leads to the thing of its name, or to a family: a mapping from names to things, under a name in capitals, that may
give a thing as text, "module:attribute". A thing is imported when it is used, a family when its names are.

A name may continue after a colon: `text:notes.txt` finds `text`, which gets the rest. Standard library only.
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

__all__ = ["GROUPS", "Entry", "PluginWarning", "entries", "find", "names"]

OWN = "pytest-lmeval"
GROUPS = {  # group -> the word for one of its things in messages
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
    """Another package registers something that cannot be imported or is not allowed; the run continues without it."""


@dataclass(frozen=True)
class Entry:
    """One registration: the name of a thing or family, its "module:attribute", and the distribution that registers it."""

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
        """Whether its target is in capitals; other entries are imported by their own name only."""
        return self.target.rpartition(":")[2].isupper()

    def load(self) -> Any:
        """The thing, or the family. Raises what its import raises, and TypeError for a family that is not in capitals or whose
        names are not strings."""
        thing = importlib.metadata.EntryPoint(self.name, self.target, self.group).load()
        if isinstance(thing, Mapping) and not self.may_be_family:
            raise TypeError(f"{self.target} is a mapping, and a family must be in capitals")
        if isinstance(thing, Mapping) and (wrong := [name for name in thing if not isinstance(name, str)]):
            raise TypeError(f"{self.target} is a family with a name that is not a string: {wrong[0]!r}")
        return thing


@functools.cache
def entries(group: str) -> tuple[Entry, ...]:
    """All registrations in a group: this package's first, then by package and name. Imports nothing.

    Raises RegistryError for an unknown group.
    """
    if group not in GROUPS:
        raise RegistryError(no_such("group", group, GROUPS))
    found = {
        Entry(group, point.name, point.value, point.dist.name if point.dist else "unknown")
        for point in _installed().select(group=f"pytest_lmeval.{group}")
    }
    return tuple(sorted(found, key=lambda entry: (not entry.is_own, entry.package, entry.name)))


def find(group: str, name: str) -> Any:
    """The thing of this name. Raises RegistryError if there is none (with the nearest name) or if several packages register it.

    Imports the entries of this name, and families.
    """
    if (found := _found(group, name)) is None:
        raise unknown(group, name)
    return found


def resolve(group: str, name: str) -> tuple[Any, str | None] | None:
    """(thing of the whole name, None), or (thing of the name before the first colon, the rest), or None.

    Raises RegistryError if several packages register it. Imports what `find` imports.
    """
    if (found := _found(group, name)) is not None:
        return found, None
    head, colon, rest = name.partition(":")
    if colon and (found := _found(group, head)) is not None:
        return found, rest
    return None


def names(group: str, pattern: str = "*") -> list[str]:
    """The names of a group that match the pattern, including those in families. Imports families only."""
    return [name for entry in entries(group) for name in _members(entry) if fnmatchcase(name, pattern)]


def things(group: str, pattern: str = "*") -> Iterator[tuple[str, Any, Entry]]:
    """Name, thing and entry of all in a group whose name matches and whose import works. Two may have the same name."""
    for entry in entries(group):
        for name in _members(entry):
            if fnmatchcase(name, pattern) and (thing := _member(entry, name)) is not None:
                yield name, thing, entry


def own(group: str) -> dict[str, Any]:
    """The things of this package's own families. Imports no other package."""
    families = [entry.load() for entry in entries(group) if entry.is_own and entry.may_be_family]
    return {name: thing for family in families for name, thing in family.items()}


def ambiguous(group: str, name: str) -> RegistryError:
    """The error for a name that several packages register."""
    registered = " and by ".join(str(entry) for entry, _ in _registered(group, name))
    return RegistryError(
        f"the {GROUPS[group]} {name!r} is registered by {registered}, so the name is ambiguous. Remove one of the packages, "
        "or rename one of the two."
    )


def unknown(group: str, name: str, also: str = "") -> RegistryError:
    """The error for an unknown name, with the nearest name and a list of all, which ends with the text `also`."""
    head = name.partition(":")[0]
    others = [entry for entry in entries(group) if entry.name in (name, head) and not entry.is_own]
    if broken := [entry for entry in others if _loaded(entry) is None]:
        return RegistryError(
            f"the {GROUPS[group]} {name!r} is registered by {broken[0]}, which cannot be imported: see the warning above. "
            "Repair or remove that package."
        )
    known = names(group)
    listed = []
    for entry in entries(group):
        if members := list(_members(entry)):
            many = f"{members[0]} and {len(members) - 1} more of {entry.name}"
            listed.append(many if len(members) > LISTED else ", ".join(members))
    near = nearest(name, known) or nearest(head, known)
    return RegistryError(f"there is no {GROUPS[group]} {name!r}.{near} There are: {', '.join(listed)}{also}.")


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that the function has a parameter for."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions that are written in C
        return {}
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = {parameter.name for parameter in parameters if parameter.kind in kinds}
    return {name: value for name, value in options.items() if name in taken}


@functools.cache
def _installed() -> Any:
    """The entry points of all installed packages, read once, since that takes milliseconds."""
    return importlib.metadata.entry_points()


def _found(group: str, name: str) -> Any:
    """The thing of this name, or None. Raises RegistryError if there are several."""
    found = _registered(group, name)
    if len(found) > 1:
        raise ambiguous(group, name)
    return found[0][1] if found else None


def _registered(group: str, name: str) -> list[tuple[Entry, Any]]:
    """All things of this name whose import works."""
    holding = [entry for entry in entries(group) if (entry.name == name or entry.may_be_family) and name in _members(entry)]
    return [(entry, thing) for entry in holding if (thing := _member(entry, name)) is not None]


def _members(entry: Entry) -> Mapping[str, Any]:
    """The names in an entry, with their things; an entry that cannot be a family is not imported."""
    if not entry.may_be_family:
        return {entry.name: None}
    thing = _loaded(entry)
    if isinstance(thing, Mapping):
        return thing
    return {} if thing is None else {entry.name: thing}


def _member(entry: Entry, name: str) -> Any:
    """The thing of this name in an entry that holds it; None if its import fails."""
    if not entry.may_be_family:
        return _loaded(entry)
    thing = _members(entry)[name]
    return _loaded(Entry(entry.group, name, thing, entry.package)) if isinstance(thing, str) else thing


@functools.cache
def _loaded(entry: Entry) -> Any:
    """The thing or family of an entry; None, with one warning, if the import of another package's fails."""
    try:
        return entry.load()
    except Exception as error:
        if entry.is_own:
            raise
        with warnings.catch_warnings():
            warnings.simplefilter("always", PluginWarning)  # not an error, even where warnings are: the run continues
            warnings.warn(
                f"{entry.package} registers the {GROUPS[entry.group]} {entry.name!r} as {entry.target}, which cannot be "
                f"imported ({type(error).__name__}: {error}). The run continues without it; repair or remove that package.",
                PluginWarning,
                stacklevel=2,
            )
        return None
