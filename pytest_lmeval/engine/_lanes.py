"""Plan the steps that read trees side by side, where rows of a batch may be at any positions.

Each node is a lane, which is open once its parent is read. A step reads the same number of tokens of several lanes. How far the
trees are cut, and in which pieces they are read, is tried in some ways, of which the one that costs least is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import inf
from typing import NamedTuple, TypeAlias

import numpy as np

from pytest_lmeval.engine._batches import Limits, cheapest, cheapest_parts
from pytest_lmeval.engine._levels import Batches
from pytest_lmeval.engine._results import NOTHING_READ, Deferred
from pytest_lmeval.engine._tree import Node

CUTS = (
    (2, 1 / 8),
    (4, 1 / 8),
    (16, 1 / 8),
    (1, 1),
    (1, inf),
)  # nodes end at multiples of this, and save more than this of a call
Piece: TypeAlias = "Callable[[int], int]"
"""(tokens that a lane has left) -> how many of them are read next."""


class Step(NamedTuple):
    """The next `length` tokens of some lanes, given by their numbers, which are read in one call."""

    members: tuple[int, ...]
    length: int


class Branch(NamedTuple):
    """A node, and the row of the state that it continues."""

    node: Node
    before: Deferred
    row: int

    @property
    def begun(self) -> bool:
        return self.before is not NOTHING_READ


class Plan(NamedTuple):
    """How trees are read.

    forest  the trees, cut to what is worth a step of its own
    steps   which read all nodes that others continue, numbered as `lanes` does
    leaves  batches of the others
    """

    forest: list[Branch]
    steps: list[Step]
    leaves: list[list[Node]]

    @property
    def tokens(self) -> int:
        """That are read, with padding."""
        inner = sum(len(members) * length for members, length in self.steps)
        return inner + sum(len(batch) * max(len(node.ids) for node in batch) for batch in self.leaves)

    @property
    def calls(self) -> int:
        return len(self.steps) + len(self.leaves)


def planned(branches: Sequence[Branch], limits: Limits, call: int, multiple: int, batches: Batches) -> Plan:
    """The cheapest plan found to read trees.

    call      what a call costs, in tokens
    multiple  states may be continued after multiples of so many tokens
    """
    plans = list[Plan]()
    for grain, part in CUTS:
        cut = [(_cut([node], grain * multiple, part * call, call, multiple), before, row) for node, before, row in branches]
        forest = [Branch(node, before, row) for nodes, before, row in cut for node in nodes]
        roots = [branch.node for branch in forest]
        inner, parents = lanes(roots)
        begun = {id(branch.node): branch.begun for branch in forest}
        steps = cheapest_steps(
            [len(node.ids) for node in inner], parents, [begun.get(id(node), True) for node in inner], limits
        )
        leaves = [node for node in _nodes(roots) if not node.children]
        continued = [[node for node in leaves if begun.get(id(node), True) == one] for one in (True, False)]
        found = zip(continued, (True, False), strict=True)
        read = [[some[number] for number in part] for some, one in found for part in batches(some, one, call)]
        plans.append(Plan(forest, steps, read))
    return cheapest(plans, call)


def lanes(roots: Sequence[Node]) -> tuple[list[Node], list[int | None]]:
    """The nodes of trees that others continue, each after its parent, and the number of the parent."""
    nodes = [node for node in _nodes(roots) if node.children]
    parents: dict[int, int] = {id(child): number for number, node in enumerate(nodes) for child in node.children}
    return nodes, [parents.get(id(node)) for node in nodes]


def _nodes(roots: Sequence[Node]) -> Iterator[Node]:
    waiting = list(reversed(roots))
    while waiting:
        yield (node := waiting.pop())
        waiting += reversed(node.children)


def cheapest_steps(lengths: Sequence[int], parents: Sequence[int | None], begun: Sequence[bool], limits: Limits) -> list[Step]:
    """The fewest steps found that read lanes of these lengths to their ends.

    parents  of each lane, the number of the one that has to be read before it
    begun    whether the first lanes, without a parent, have a state
    """
    roots = [number for number, parent in enumerate(parents) if parent is None and lengths[number]]
    begin = _first_steps([number for number in roots if not begun[number]], lengths, limits)
    opened = [number for number in roots if begun[number]]
    pieces: tuple[Piece, ...] = (_power, int)
    firsts: tuple[Callable[[list[int]], int], ...] = (max, min)
    ways = product(pieces, firsts)
    return min((_steps(lengths, parents, opened, begin, limits, piece, first) for piece, first in ways), key=len)


def _power(left: int) -> int:
    """The largest power of two among so many tokens: then lanes of any lengths meet, in steps whose number is a logarithm."""
    return 1 << left.bit_length() - 1


def _steps(
    lengths: Sequence[int],
    parents: Sequence[int | None],
    begun: Sequence[int],
    begin: Sequence[Step],
    limits: Limits,
    piece: Piece,
    first: Callable[[list[int]], int],
) -> list[Step]:
    """The steps of `begin`, then some in pieces of one kind: a full call if there is one, or else the `first` of the pieces."""
    left, steps, opened = list(lengths), list[Step](), dict[int, list[int]]()
    children = [list[int]() for _ in lengths]
    for number, parent in enumerate(parents):
        if parent is not None:
            children[parent].append(number)

    def open_lanes(numbers: Sequence[int]) -> None:
        for number in numbers:
            opened.setdefault(piece(left[number]), []).append(number)

    def read(members: Sequence[int], length: int) -> None:
        steps.append(Step(tuple(members), length))
        for number in members:
            left[number] -= length
            open_lanes([number] if left[number] else children[number])

    open_lanes(begun)
    for step in begin:
        read(*step)
    while opened:
        full = [length for length, numbers in opened.items() if len(numbers) >= rows_of(length, limits)]
        length = first(full or list(opened))
        rows, numbers = rows_of(length, limits), opened.pop(length)
        if numbers[rows:]:
            opened[length] = numbers[rows:]
        read(numbers[:rows], length)
    return steps


def _first_steps(numbers: Sequence[int], lengths: Sequence[int], limits: Limits) -> list[Step]:
    """Full calls of lanes that have no state, up to the shortest of each."""
    longest_first = sorted(numbers, key=lambda number: -lengths[number])
    ordered = np.array([lengths[number] for number in longest_first])
    sums = np.cumsum([0, *ordered])

    def calls(begin: int) -> np.ndarray:
        """One, and those that what is left takes at least."""
        rows = np.arange(1, min(limits.rows, len(ordered) - begin) + 1)
        read = rows * ordered[begin : begin + len(rows)]
        left = sums[begin + rows] - sums[begin] - read
        return np.where((rows == 1) | (read <= limits.tokens), 1 + left / limits.tokens, inf)

    parts = cheapest_parts(len(ordered), calls)
    return [Step(tuple(longest_first[index] for index in part), int(ordered[part[-1]])) for part in parts]


def rows_of(length: int, limits: Limits) -> int:
    """How many lanes may be read side by side in a step of so many tokens."""
    return max(1, min(limits.rows, limits.tokens // length))


def _cut(nodes: Sequence[Node], grain: int, least: float, call: float, multiple: int) -> list[Node]:
    """Trees without the nodes that do not save more than `least` tokens; these, and what stands after the last multiple of
    `grain`, are read again with each child. What the next block may continue is not cut."""
    found = list[Node]()
    for node in nodes:
        if not node.children:
            found.append(node)
            continue
        needed = node.last and len(node.ids) > call
        length = max(0, len(node.ids) - node.end % (multiple if needed else grain))
        if not length or not (needed or length * (len(node.children) - 1) > least):
            found += _cut(node.pushed(), grain, least, call, multiple)
        else:
            head, rest = node.split(length)
            found.append(replace(head, children=tuple(_cut(rest.pushed(), grain, least, call, multiple))))
    return found
