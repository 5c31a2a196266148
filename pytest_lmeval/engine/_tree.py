"""Build a prefix tree over token ids, which holds each shared prefix of several sequences once.

few-shot examples ── passage ── question ── " yes"
                 │           │          └── " no"
                 └── passage ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

import numpy as np

from pytest_lmeval.engine._tokens import ids_of
from pytest_lmeval.errors import StreamError

Span: TypeAlias = "tuple[int, int, int]"
"""(request, begin, end): the logits at these positions of its sequence score the request's tokens after them."""


@dataclass(frozen=True)
class Request:
    """Tokens to score, after their context. Raises StreamError for values that make no sense.

    ids          [n] context and tokens to score; the last one is only predicted, never read
    context_len  the number of context tokens, at least one; n for a prompt, whose continuation is generated
    """

    ids: np.ndarray
    context_len: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", ids_of(self.ids, "a request"))
        if not 1 <= self.context_len <= len(self.ids):
            raise StreamError(
                f"a request of {len(self.ids)} tokens has context_len={self.context_len}; expected 1 to {len(self.ids)}: "
                "the first token has nothing before it to predict it from."
            )

    @property
    def asked(self) -> int:
        """The number of tokens to score."""
        return len(self.ids) - self.context_len

    @property
    def read(self) -> np.ndarray:
        """The ids that have to be read."""
        return self.ids[:-1] if self.asked else self.ids

    @property
    def shareable(self) -> int:
        """The number of tokens that requests may share: each prompt reads its last one itself."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Node:
    """A run of tokens that is read in one step, and the nodes that follow it.

    ids       [n] the tokens
    start     the number of tokens before them
    children  the nodes that follow; none at the end of a sequence
    wanted    the logits that score tokens
    owner     the first of the requests that contain the node, for which its tokens are counted
    last      whether the last of all requests contains the node
    """

    ids: np.ndarray
    start: int
    children: tuple[Node, ...]
    wanted: tuple[Span, ...]
    owner: int
    last: bool

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @property
    def leaves(self) -> int:
        return sum(child.leaves for child in self.children) or 1

    @property
    def size(self) -> int:
        """Tokens of the node and of all that follow it."""
        return len(self.ids) + sum(child.size for child in self.children)

    @property
    def scored(self) -> int:
        """The number of tokens among these whose logits are wanted."""
        return sum(end - begin for _, begin, end in self.wanted) + sum(child.scored for child in self.children)

    def split(self, count: int) -> tuple[Node, Node]:
        """Its first `count` tokens, and those after them."""
        at = self.start + count
        before = tuple((number, begin, min(end, at)) for number, begin, end in self.wanted if begin < at)
        after = tuple((number, max(begin, at), end) for number, begin, end in self.wanted if end > at)
        return replace(self, ids=self.ids[:count], wanted=before), replace(self, ids=self.ids[count:], start=at, wanted=after)

    def pushed(self) -> list[Node]:
        """Its children, each with its tokens in front, which are then read once for each child."""
        joined = [replace(child, ids=np.concatenate([self.ids, child.ids]), start=self.start) for child in self.children]
        return [replace(joined[0], wanted=self.wanted + joined[0].wanted), *joined[1:]] if joined else [self]

    def dealt(self, groups: Sequence[Sequence[Node]]) -> list[Node]:
        """The node before each of these groups of its children; only before the first are logits of its own tokens wanted."""
        return [replace(self, children=tuple(some), wanted=() if index else self.wanted) for index, some in enumerate(groups)]


def worth_a_step(tokens: int, leaves: int, step: float) -> bool:
    """Whether it is cheaper to read tokens that `leaves` sequences share once, in a step, than with each of them."""
    return tokens * (leaves - 1) > step


def tree(requests: Sequence[Request], members: Sequence[int] | None = None, *, start: int = 0, step: float) -> list[Node]:
    """The nodes after the first `start` tokens, which all `members` (numbers of requests; by default all) share.

    A request that reads a prefix of what another reads has no path of its own, but each prompt ends in its own leaf, even where
    two are equal. With an infinite `step`, nothing else is shared.
    """
    members = range(len(requests)) if members is None else members
    keys = {number: _key(requests[number], number) for number in members}
    paths: list[list[int]] = []  # requests along each longest sequence, the longest last
    for number in sorted(members, key=keys.__getitem__):
        if paths and keys[number].startswith(keys[paths[-1][-1]]):
            paths[-1].append(number)
        else:
            paths.append([number])
    return _grow(requests, paths, start, start, step)


def _key(request: Request, number: int) -> bytes:
    """The sort key of a request: its tokens. That of a prompt is unique, and sorts after all sequences that continue it."""
    tokens = request.ids[: request.shareable].astype(">i8").tobytes()
    return tokens if request.asked else tokens + (~number).to_bytes(8, "big", signed=True)


def _grow(requests: Sequence[Request], paths: list[list[int]], start: int, shared: int, step: float) -> list[Node]:
    """The nodes of sorted paths whose first `shared` tokens are equal, and whose first `start` are in nodes already."""

    def branch(path: list[int]) -> int:
        """The next token, or a unique number for a path that ends."""
        request = requests[path[-1]]
        return int(request.ids[shared]) if shared < request.shareable else ~path[-1]

    nodes = []
    for _, members in groupby(paths, key=branch):
        group = list(members)
        first, last = (requests[path[-1]] for path in (group[0], group[-1]))
        end = len(first.read)
        if len(group) > 1:
            end = shared + common_prefix_len(*(one.ids[shared : one.shareable] for one in (first, last)))
            if not worth_a_step(end - start, len(group), step):
                nodes += _grow(requests, group, start, end, step)
                continue
        numbers = [number for path in group for number in path]
        wanted = [(n, max(requests[n].context_len - 1, start), min(len(requests[n].ids) - 1, end)) for n in numbers]
        children = tuple(_grow(requests, group, end, end, step)) if len(group) > 1 else ()
        spans = tuple((number, begin, stop) for number, begin, stop in wanted if begin < stop)
        nodes.append(Node(first.read[start:end], start, children, spans, min(numbers), len(requests) - 1 in numbers))
    return nodes


def common_prefix_len(first: np.ndarray, second: np.ndarray) -> int:
    """The length of the common prefix of two sequences."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
