"""Plan how trees are read whose states grow: rows of a batch have read the same number of tokens.

Nodes that begin at one position are read up to the end of the shortest, those of similar lengths together. What a longer one
has left is read again with each of its children, or in a step of its own. Each batch has leaves of its own, in calls of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple, TypeAlias

import numpy as np

from pytest_lmeval.engine._batches import Limits, cheapest, cheapest_parts
from pytest_lmeval.engine._tree import Node

Branches: TypeAlias = "list[tuple[Node, int]]"  # nodes, each with the row of a state that it continues
Batches: TypeAlias = "Callable[[Sequence[Node], bool, int], list[list[int]]]"
"""(leaves, whether they continue a state, what a call costs) -> the numbers of those that are read together."""

PRICES = (1, 2, 4, 8)  # times the cost of a call, with which a plan is tried


class Reading(NamedTuple):
    """How a block may be read.

    inner     the most that is read at once of nodes that others continue
    leaves    the same of leaves
    call      what a call costs, in tokens
    calls     that a batch of leaves takes
    multiple  states may be continued after multiples of so many tokens
    batches   of leaves
    """

    inner: Limits
    leaves: Limits
    call: int
    calls: int
    multiple: int
    batches: Batches


class Level(NamedTuple):
    """What continues one state.

    leaves  batches that are read to their ends
    below   batches, each with the tokens that are read of each of its nodes, and what continues the state there
    tokens  that all of it takes, with padding
    calls   the same
    """

    leaves: list[Branches]
    below: list[tuple[Branches, int, Level]]
    tokens: int
    calls: int


def planned(reading: Reading, nodes: Sequence[Node], *, begun: bool) -> Level:
    """The cheapest plan found to read trees that continue row 0 of a state, or none."""
    branches = [(node, 0) for node in nodes]
    return cheapest([_level(reading, branches, begun, price * reading.call) for price in PRICES], reading.call)


def following(batch: Branches, length: int) -> Branches:
    """What continues the state after so many tokens of each node."""
    found: Branches = []
    for row, (node, _) in enumerate(batch):
        rest = node.split(length)[1]
        found += [(rest, row)] if len(rest.ids) else [(child, row) for child in rest.children]
    return found


def _level(reading: Reading, branches: Branches, begun: bool, call: int) -> Level:
    while True:
        leaves = [branch for branch in branches if not branch[0].children]
        inner = [branch for branch in branches if branch[0].children]
        inner.sort(key=lambda branch: -_length(reading, branch[0]))
        costs = _Costs(reading, call, [node for node, _ in inner], [_length(reading, node) for node, _ in inner])
        parts = cheapest_parts(len(inner), costs.of)
        pushed = [part for part in parts if not costs.reads(part)]
        if not pushed:
            break
        others = [inner[number] for part in parts if part not in pushed for number in part]
        children = [(child, inner[number][1]) for part in pushed for number in part for child in inner[number][0].pushed()]
        branches = [*leaves, *others, *children]
    batches = [[leaves[number] for number in part] for part in reading.batches([node for node, _ in leaves], begun, call)]
    together = [([inner[number] for number in part], costs.lengths[part[-1]]) for part in parts]
    below = [(batch, length, _level(reading, following(batch, length), True, call)) for batch, length in together]
    tokens = sum(len(batch) * max(len(node.ids) for node, _ in batch) for batch in batches)
    tokens += sum(len(batch) * length + after.tokens for batch, length, after in below)
    calls = reading.calls * len(batches) + sum(1 + after.calls for *_, after in below)
    return Level(batches, below, tokens, calls)


def _length(reading: Reading, node: Node) -> int:
    """The tokens of a node after which its state may be continued."""
    return max(0, len(node.ids) - node.end % reading.multiple)


@dataclass
class _Costs:
    """What it costs to read nodes, the longest first, that begin at one position: each call, and each token that is read again.

    lengths  the tokens of each that may be read before its children
    """

    reading: Reading
    call: int
    nodes: list[Node]
    lengths: list[int]

    def __post_init__(self) -> None:
        again = [len(node.children) - 1 for node in self.nodes]
        below = [node.size - len(node.ids) for node in self.nodes]
        needed = [node.last and len(node.ids) > self.reading.call for node in self.nodes]  # the next block may continue it
        found = zip(again, self.lengths, (node.leaves for node in self.nodes), below, needed, strict=True)
        sums = [(more, length * more, leaves, tokens, must) for more, length, leaves, tokens, must in found]
        self._sums = np.cumsum([(0,) * 5, *sums], axis=0)
        self._read = list[np.ndarray]()  # by the first node, whether to read it with 0, 1, ... others

    def of(self, begin: int) -> np.ndarray:
        """The cost of the next 1, 2, ... nodes: read together, or not before their children."""
        read, pushed = self._both(begin)
        self._read.append(read < pushed)
        return np.where(read < pushed, read, pushed)

    def reads(self, part: range) -> bool:
        """Whether it is cheaper to read these together; all have been asked for."""
        return bool(self._read[part.start][len(part) - 1])

    def _both(self, begin: int) -> tuple[np.ndarray, np.ndarray]:
        inner, leaf = self.reading.inner, self.reading.leaves
        rows = np.arange(1, min(inner.rows, len(self.nodes) - begin) + 1)
        again, tokens_again, leaves, below, needed = (self._sums[begin + rows] - self._sums[begin]).T
        length = np.asarray(self.lengths[begin : begin + len(rows)])
        left = tokens_again - length * again
        batches = np.maximum(leaves / leaf.rows, (left + below) / leaf.tokens)
        of_leaves = self.reading.calls * self.call
        fits = (length > 0) & ((rows == 1) | (rows * length <= inner.tokens))
        read = np.where(fits, self.call + left + of_leaves * np.ceil(batches), inf)
        pushed = np.where((needed > 0) & (length > 0), inf, tokens_again + of_leaves * leaves / leaf.rows)
        return read, pushed
