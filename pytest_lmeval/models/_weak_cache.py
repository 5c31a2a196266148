"""Cache one value per object, outside of the object and only while it lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class WeakCache(Generic[T]):
    """One value for each object, found by identity. An object that cannot be weakly referenced is kept alive by its entry."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Callable[[], object], Hashable, T]] = {}

    def __contains__(self, owner: object) -> bool:
        entry = self._entries.get(id(owner))
        return entry is not None and entry[0]() is owner

    def __len__(self) -> int:
        return len(self._entries)

    def value(self, owner: object, find: Callable[[], T], stamp: Hashable = None) -> T:
        """The value cached for `owner` if it was stored with this stamp; otherwise call `find` and store what it returns."""
        if owner in self and self._entries[id(owner)][1] == stamp:
            return self._entries[id(owner)][2]
        key, found = id(owner), find()

        def forget(gone: weakref.ref[object]) -> None:
            entry = self._entries.get(key)
            if entry is not None and entry[0] is gone:  # another object may have the same address by now
                del self._entries[key]

        try:
            self._entries[key] = (weakref.ref(owner, forget), stamp, found)
        except TypeError:
            self._entries[key] = (lambda: owner, stamp, found)
        return found
