"""A prefix tree over token ids: what several sequences begin with alike stands in it once.

    few-shot examples ── passage ── question ── " yes"
                     │           │          └── " no"
                     │           └─ question ...
                     └── passage ...

Each node is a run of tokens that is read in one step. Sequences part where they differ, but for runs so short that reading them
again costs less than a step of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from pytest_lmeval.engine._tokens import ids_of
from pytest_lmeval.errors import StreamError

STEP = 16  # what a step costs beside the reading itself, in tokens


@dataclass(frozen=True)
class Request:
    """Tokens whose likelihood is asked for, and their context. Raises StreamError for what cannot be asked.

    ids          [n] all of them; the last one is only predicted, never read
    context_len  how many of them are the context, at least one; all of them for a prompt that is to be continued
    """

    ids: np.ndarray
    context_len: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", ids_of(self.ids, "a request"))
        if not 1 <= self.context_len <= len(self.ids):
            raise StreamError(
                f"a request of {len(self.ids)} tokens has context_len={self.context_len}: at least one token is its context, "
                "for the first one has nothing before it to be predicted from, and at most all are."
            )

    @property
    def asked(self) -> int:
        """How many likelihoods are asked for."""
        return len(self.ids) - self.context_len

    @property
    def read(self) -> np.ndarray:
        """What has to be read."""
        return self.ids[:-1] if self.asked else self.ids

    @property
    def shareable(self) -> int:
        """How many of the tokens that are read others may share: the last one of a prompt begins an answer of its own."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Node:
    """A run of tokens, and where they go on.

    ids       [n] the tokens
    start     how many stand before them
    children  what follows; none at the end of a sequence
    wanted    (request, begin, end): the logits at these positions of the sequence score the request's tokens after them
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
        split = self.start + count
        wanted = ((number, begin, min(end, split)) for number, begin, end in self.wanted if begin < split)
        return replace(self, ids=self.ids[:count], wanted=tuple(wanted))

    def after(self, count: int) -> Node:
        """What is left of it when its first `count` tokens are read."""
        split = self.start + count
        wanted = ((number, max(begin, split), end) for number, begin, end in self.wanted if end > split)
        return replace(self, ids=self.ids[count:], start=split, wanted=tuple(wanted))

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

    A request that reads only what another reads too has no path of its own, unless it is a prompt: each of these ends in a leaf
    of its own, also where two are equal. With an infinite `step`, nothing else is shared.
    """
    members = range(len(requests)) if members is None else members
    keys = {number: _key(requests[number], number) for number in members}
    order = sorted(members, key=lambda number: keys[number])
    paths: list[list[int]] = []  # requests along each longest sequence, the longest last
    for number in order:
        if paths and keys[number].startswith(keys[paths[-1][-1]]):
            paths[-1].append(number)
        else:
            paths.append([number])
    return _grow(requests, paths, start, start, step)


def _key(request: Request, number: int) -> bytes:
    """What sequences are sorted by: their tokens. A prompt ends in a key of its own, behind all that goes on."""
    tokens = request.ids[: request.shareable].astype(">i8").tobytes()
    return tokens if request.asked else tokens + (~number).to_bytes(8, "big", signed=True)


def _grow(requests: Sequence[Request], paths: list[list[int]], start: int, shared: int, step: float) -> list[Node]:
    """The nodes of sorted paths that are alike up to `shared`, the tokens from `start` on not yet standing in a node."""
    nodes = []
    for _, members in groupby(paths, key=_branch(requests, shared)):
        group = list(members)
        first, last = (requests[path[-1]] for path in (group[0], group[-1]))
        end = (
            len(first.read)
            if len(group) == 1
            else shared + common_prefix_len(*(one.ids[shared : one.shareable] for one in (first, last)))
        )
        if len(group) > 1 and not worth_a_step(end - start, len(group), step):
            nodes += _grow(requests, group, start, end, step)
            continue
        numbers = [number for path in group for number in path]
        wanted = (
            (number, max(requests[number].context_len - 1, start), min(len(requests[number].ids) - 1, end))
            for number in numbers
        )
        nodes.append(
            Node(
                first.read[start:end],
                start,
                tuple(_grow(requests, group, end, end, step)) if len(group) > 1 else (),
                tuple(span for span in wanted if span[1] < span[2]),
                min(numbers),
                len(requests) - 1 in numbers,
            )
        )
    return nodes


def _branch(requests: Sequence[Request], at: int) -> Callable[[list[int]], int]:
    """What paths part by at a position: the token there, or a path's own number where it ends."""

    def branch(path: list[int]) -> int:
        request = requests[path[-1]]
        return int(request.ids[at]) if at < request.shareable else ~path[-1]

    return branch


def common_prefix_len(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
