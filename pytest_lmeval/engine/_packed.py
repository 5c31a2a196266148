"""Read whole prefix trees in one row: each token sees its own ancestors only, and stands where it would alone.

few-shot examples │ question ┬ " yes"   question ┬ " yes"   ...        every token once, in few calls of the size
   (a state)      │          └ " no"             └ " no"               that costs least (`_costs`)

What many trees begin with, and a sequence longer than a call likes, is read first, and packs continue its state.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from pytest_lmeval.engine._executor import TURNS, Choose, NodeReader, answer_batch
from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._memory import most_logits
from pytest_lmeval.engine._policy import USUAL
from pytest_lmeval.engine._pool import Pool
from pytest_lmeval.engine._prefix_cache import Keep, PrefixCache
from pytest_lmeval.engine._results import NOTHING_READ, Deferred, Results, Scored
from pytest_lmeval.engine._tree import Node, Request
from pytest_lmeval.models._model import State, fork

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine

LARGEST = 2  # times the best size, that a call may have


class Packed:
    """Scores and generates over the prefix tree of each block of requests, in packs."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = weakref.proxy(engine)  # no reference cycle: states are freed with the engine, not at a collection
        self.prefix_cache = PrefixCache()
        longest, self.costs = engine.policy.longest, engine.policy.costs or USUAL
        self.best = min(self.costs.pack, longest or self.costs.pack)
        self.most = min(LARGEST * self.best, longest or LARGEST * self.best)
        self.most_logits = min(self.most, most_logits(engine.lm))

    def score(self, requests: Sequence[Request], results: Results[Scored]) -> list[Scored]:
        reader = PackReader(self.engine, requests, results)
        self.prefix_cache.walk(requests, 0, partial(self._visit, reader))
        return reader.scored

    def _visit(self, reader: PackReader, before: Deferred, nodes: Sequence[Node], keep: Keep) -> None:
        """Read the trees that continue a state."""
        packs, trunks = self.plan(nodes)
        for pack in packs:
            reader.read_pack(pack, before)
        for trunk in trunks:
            state = self._read_trunk(reader, trunk, before)
            if trunk.last:
                keep(reader.requests[trunk.owner].ids[: trunk.end], state)
            if trunk.children:
                self._visit(reader, state, trunk.children, keep)

    def plan(self, nodes: Sequence[Node], front: int = 0) -> tuple[list[list[Node]], list[Node]]:
        """The packs, each of trees that are read together; and the nodes that are read before what follows them.

        front  tokens that each pack has in front of the trees
        """
        small, packs, trunks = list[Node](), list[list[Node]](), list[Node]()
        for node in nodes:
            if self._is_trunk(node, front):
                trunks.append(node)
            elif self._fits([node], front):
                small.append(node)
            else:  # its few tokens are read again in each pack
                inner, below = self.plan(node.children, front + len(node.ids))
                fronts = node.dealt([*inner, *([one] for one in below)])
                packs += [[one] for one in fronts[: len(inner)]]
                trunks += [one.pushed()[0] for one in fronts[len(inner) :]]
        return self._balanced(small, front) + packs, trunks

    def _is_trunk(self, node: Node, front: int) -> bool:
        """Whether to read a node in a call of its own, whose state the rest continues, and not with each pack."""
        own, packs = len(node.ids), -(-node.size // self.best)
        if node.last and node.children and own > self.costs.call:
            return True  # the next block may continue it, as the questions about one passage do
        pairs = own * (node.size - own / 2)  # of tokens, which need not be compared then
        if self.costs.reach and pairs > self.costs.call * self.costs.reach:
            return True
        if self._fits([node], front):
            return False
        return not node.children or own * (packs - 1) > self.costs.call or 2 * (front + own) > self.most

    def _fits(self, pack: Sequence[Node], front: int) -> bool:
        size, scored = sum(node.size for node in pack), sum(node.scored for node in pack)
        return front + size <= self.most and scored <= self.most_logits

    def _balanced(self, nodes: list[Node], front: int) -> list[list[Node]]:
        """Packs of about the best size, and none too large; the largest tree goes where there is most room."""
        size = sum(node.size for node in nodes)
        count = min(len(nodes), max(1, round(size / max(1, self.best - front))))
        largest_first = sorted(range(len(nodes)), key=lambda index: -nodes[index].size)
        while nodes:
            filled = [(0, number) for number in range(count)]
            packs = [list[int]() for _ in range(count)]
            for index in largest_first:
                size, number = heapq.heappop(filled)
                packs[number].append(index)
                heapq.heappush(filled, (size + nodes[index].size, number))
            found = [[nodes[index] for index in sorted(pack)] for pack in packs]
            if all(self._fits(pack, front) for pack in found):
                return found
            count += 1
        return []

    def _read_trunk(self, reader: NodeReader, trunk: Node, before: Deferred) -> Deferred:
        """Read a node alone, in steps whose logits fit into memory; returns the state after it."""
        scored = sum(end - begin for _, begin, end in trunk.wanted)
        length = len(trunk.ids) if scored <= self.most_logits else self.most_logits
        while len(trunk.ids):
            head, trunk = trunk.split(min(length, len(trunk.ids)))
            before = before if before is NOTHING_READ else before.then(fork)
            before = reader.read([head], torch.from_numpy(head.ids[None]), before)
        return before

    def generate(self, answers: Sequence[Answer], choose: Choose, results: Results[Answer]) -> None:
        prompts = [Request(answer.prompt.ids, len(answer.prompt.ids)) for answer in answers]
        reader = NodeReader(self.engine, prompts, Results())
        size = TURNS * self.engine.policy.batch_size

        def visit(before: Deferred, nodes: Sequence[Node], keep: Keep) -> None:
            waiting = list[Node]()
            for node in nodes:
                groups = -(-node.leaves // size) + node.last  # the next block may continue it, too
                if node.children and len(node.ids) * (groups - 1) > self.costs.call:
                    state = self._read_trunk(reader, node, before)
                    if node.last:
                        keep(prompts[node.owner].ids[: node.end], state)
                    visit(state, node.children, keep)
                else:
                    waiting += _leaves(node)
            for begin in range(0, len(waiting), size):
                group = waiting[begin : begin + size]
                rows = [(answers[node.owner], node.ids) for node in group]
                pool = partial(self._answer, before, group[0].start, rows, choose)
                answer_batch(self.engine, [node.owner for node in group], [answer for answer, _ in rows], results, pool)

        self.prefix_cache.walk(prompts, 0, visit)
        for answer, shared in zip(answers, reader.scored, strict=True):
            answer.read += shared.read

    def _answer(self, before: Deferred, start: int, rows: list[tuple[Answer, np.ndarray]], choose: Choose) -> None:
        Pool(self.engine, self.costs, self.most, before.get(), start).answer(rows, choose)


class PackReader(NodeReader):
    """Reads packs, too."""

    def read_pack(self, roots: Sequence[Node], before: Deferred) -> None:
        """Read trees that continue one state, in one row."""
        nodes = list(with_parents(roots))
        size = sum(len(node.ids) for node, _ in nodes)
        reading = Deferred(lambda: self._read_pack(nodes, before.get()))
        self.plan([node for node, _ in nodes], size, reading)

    def _read_pack(self, nodes: list[tuple[Node, int | None]], state: State) -> None:
        rows, columns, spans = self.wanted([node for node, _ in nodes])
        if spans:
            ids, positions, visible, begins = arranged(nodes)
            wanted, of_span = np.unique(begins[rows] + columns, return_inverse=True)
            device = self.engine.lm.device
            arrays = [torch.from_numpy(array).to(device) for array in (ids[None], positions, visible, wanted)]
            logits, _ = self.engine.packed_step(arrays[0], state, *arrays[1:])
            in_order = np.array_equal(of_span, np.arange(len(wanted)))  # as mostly: no copy
            self.record(spans, logits if in_order else logits[torch.from_numpy(of_span).to(device)])
        self.engine.counts.hold(state)


def arranged(nodes: Sequence[tuple[Node, int | None]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The tokens [t] of nodes after c others, the position of each [t], what each sees [t, c + t], and where the nodes begin.

    nodes  each with the number of its parent, which comes before it; None if it continues what is before them
    """
    begins = np.cumsum([0, *(len(node.ids) for node, _ in nodes)])
    start, size = nodes[0][0].start, int(begins[-1])
    visible, positions = np.zeros((size, start + size), dtype=bool), np.empty(size, dtype=np.int64)
    visible[:, :start] = True
    for (node, parent), begin in zip(nodes, begins, strict=False):
        end = begin + len(node.ids)
        if parent is not None:  # what its last token sees
            visible[begin:end, start:] = visible[begins[parent + 1] - 1, start:]
        visible[begin:end, start + begin : start + end] = np.tri(end - begin, dtype=bool)
        positions[begin:end] = np.arange(node.start, node.end)
    return np.concatenate([node.ids for node, _ in nodes]), positions, visible, begins[:-1]


def with_parents(roots: Sequence[Node]) -> Iterator[tuple[Node, int | None]]:
    """The nodes of trees, each after its parent, with the number of the parent."""
    waiting: list[tuple[Node, int | None]] = [(root, None) for root in reversed(roots)]
    number = 0
    while waiting:
        node, parent = waiting.pop()
        yield node, parent
        waiting += [(child, number) for child in reversed(node.children)]
        number += 1


def _leaves(node: Node) -> list[Node]:
    """The whole sequences of a tree, each with all its tokens."""
    if not node.children:
        return [node]
    return [leaf for child in node.children for leaf in _leaves(_prepended(node, child))]


def _prepended(node: Node, child: Node) -> Node:
    return replace(child, ids=np.concatenate([node.ids, child.ids]), start=node.start)
