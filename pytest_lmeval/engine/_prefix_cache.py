"""Keep the states after prefixes that one block of requests shares with the next: few-shot examples, a passage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from pytest_lmeval.engine._results import NOTHING_READ, Deferred
from pytest_lmeval.engine._tree import Node, Request, tree

KEPT = 4  # prefixes: few-shot examples, a passage, and prefixes between them

Keep: TypeAlias = "Callable[[np.ndarray, Deferred], None]"
"""Keep the state after a prefix for the next block."""
Visit: TypeAlias = "Callable[[Deferred, list[Node], Keep], None]"
"""Read the trees that continue a state."""


class PrefixCache:
    """Prefixes of the last request of a block, and the state after each."""

    def __init__(self) -> None:
        self._entries: list[tuple[np.ndarray, Deferred]] = []
        self._next: list[tuple[np.ndarray, Deferred]] = []

    def walk(self, requests: Sequence[Request], step: float, visit: Visit) -> None:
        """Visit the trees of a block (see `begin`), each with those that continue the same state."""
        for state, nodes in self.begin(requests, step):
            visit(state, nodes, self.keep)
        self.end()

    def begin(self, requests: Sequence[Request], step: float) -> list[tuple[Deferred, list[Node]]]:
        """Build the prefix tree of a block (see `tree` for `step`), each request after the longest prefix here that it
        continues; returns the trees after each state."""
        left, found = list(range(len(requests))), []
        self._next = [(prefix, state) for prefix, state in self._entries if requests and _continues(requests[-1], prefix)]
        nothing = (np.empty(0, dtype=np.int64), NOTHING_READ)
        for prefix, state in [*sorted(self._entries, key=lambda entry: -len(entry[0])), nothing]:
            if members := [number for number in left if _continues(requests[number], prefix)]:
                left = sorted({*left} - {*members})
                found.append((state, tree(requests, members, start=len(prefix), step=step)))
        return found

    def keep(self, prefix: np.ndarray, state: Deferred) -> None:
        """Keep the state after a prefix of the last request of the block."""
        self._next.append((prefix, state))

    def end(self) -> None:
        """Go on to the next block."""
        self._entries = sorted(self._next, key=lambda entry: len(entry[0]))[:KEPT]  # more requests share the shorter ones
        self._next = []

    def settle(self) -> None:
        """Compute the states that will be kept where that takes no reading, so that what they are a part of is freed."""
        for _, state in self._next:
            state.settle()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prefix."""
        return [len(prefix) for prefix, _ in self._entries]


def _continues(request: Request, prefix: np.ndarray) -> bool:
    """Whether a request begins with a prefix, all of which is its context."""
    return request.context_len > len(prefix) and np.array_equal(request.ids[: len(prefix)], prefix)
