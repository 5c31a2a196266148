"""A prefix tree over token ids: what several sequences begin with alike stands in it once.

    few-shot examples ── passage ── question ── " yes"
                     │           │          └── " no"
                     │           └─ question ...
                     └── passage ...

Each node is a run of tokens that is read in one step. Sequences part where they differ, but for runs so short that reading them
again costs less than a step of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

STEP = 16  # what a step costs beside the reading itself, in tokens


@dataclass(frozen=True)
class Request:
    """Tokens whose likelihood is asked for, and what stands before them.

    ids    [n] all of them; the last one is only predicted, never read
    given  how many of them are given; at least one
    """

    ids: np.ndarray
    given: int

    @property
    def read(self) -> np.ndarray:
        """[n - 1] what has to be read."""
        return self.ids[:-1]


@dataclass(frozen=True)
class Node:
    """A run of tokens, and where they go on.

    ids       [n] the tokens
    start     how many stand before them
    children  what follows; none at the end of a sequence
    wanted    (position, request, target): the likelihood of `target` after the token at `position` of the sequence
    owner     the first of the requests that go through here: its reading is what the tokens are counted to
    last      whether the last of the requests goes through here
    """

    ids: np.ndarray
    start: int
    children: tuple[Node, ...]
    wanted: tuple[tuple[int, int, int], ...]
    owner: int
    last: bool

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @property
    def leaves(self) -> int:
        return sum(child.leaves for child in self.children) or 1

    def head(self, count: int) -> Node:
        """Its first `count` tokens."""
        end = self.start + count
        return replace(self, ids=self.ids[:count], wanted=tuple(want for want in self.wanted if want[0] < end))

    def after(self, count: int) -> Node:
        """What is left of it when its first `count` tokens are read."""
        start = self.start + count
        return replace(self, ids=self.ids[count:], start=start, wanted=tuple(want for want in self.wanted if want[0] >= start))

    def pushed(self) -> list[Node]:
        """Its children, each beginning with its tokens: they are read once for each of them."""
        joined = [replace(child, ids=np.concatenate([self.ids, child.ids]), start=self.start) for child in self.children]
        return [replace(joined[0], wanted=self.wanted + joined[0].wanted), *joined[1:]] if joined else [self]


def worth_a_step(tokens: int, leaves: int, step: float = STEP) -> bool:
    """Whether tokens that so many sequences share are cheaper read once, in a step of their own, than with each of them."""
    return tokens * (leaves - 1) > step


def tree(
    requests: Sequence[Request], members: Sequence[int] | None = None, *, start: int = 0, step: float = STEP
) -> list[Node]:
    """The nodes that follow the first `start` tokens, which all `members` (all requests) share.

    A request that reads only what another reads too has no path of its own. With an infinite `step`, nothing else is shared.
    """
    members = range(len(requests)) if members is None else members
    keys = {number: requests[number].read.astype(">i8").tobytes() for number in members}
    order = sorted(members, key=lambda number: keys[number])
    paths: list[list[int]] = []  # requests along each longest sequence, the longest last
    for number in order:
        if paths and keys[number].startswith(keys[paths[-1][-1]]):
            paths[-1].append(number)
        else:
            paths.append([number])
    return _grow(requests, paths, start, start, step)


def _grow(requests: Sequence[Request], paths: list[list[int]], start: int, shared: int, step: float) -> list[Node]:
    """The nodes of sorted paths that are alike up to `shared`, the tokens from `start` on not yet standing in a node."""
    nodes = []
    for _, members in groupby(paths, key=lambda path: int(requests[path[-1]].read[shared]) if len(paths) > 1 else 0):
        group = list(members)
        first, last = (requests[path[-1]].read for path in (group[0], group[-1]))
        end = len(first) if len(group) == 1 else shared + alike(first[shared:], last[shared:])
        if len(group) > 1 and not worth_a_step(end - start, len(group), step):
            nodes += _grow(requests, group, start, end, step)
            continue
        nodes.append(
            Node(
                first[start:end],
                start,
                tuple(_grow(requests, group, end, end, step)) if len(group) > 1 else (),
                tuple(want for path in group for number in path for want in _wanted(requests[number], number, start, end)),
                min(number for path in group for number in path),
                any(len(requests) - 1 in path for path in group),
            )
        )
    return nodes


def _wanted(request: Request, number: int, start: int, end: int) -> list[tuple[int, int, int]]:
    positions = range(max(request.given - 1, start), min(len(request.ids) - 1, end))
    return [(position, number, int(request.ids[position + 1])) for position in positions]


def alike(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
