"""Read prefix trees of a model whose states all have one shape, as recurrent ones have: rows at any positions form a batch.

All nodes that others continue are read side by side (`_lanes`), then the leaves, padded on the right. Answers are generated
side by side too: as one ends, the next prompt takes its row (continuous batching).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

import torch

from pytest_lmeval.engine._batches import Limits
from pytest_lmeval.engine._executor import TURNS, Choose, NodeReader, answer_batch, padded_batches, with_states
from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._lanes import Branch, cheapest_steps, lanes, planned
from pytest_lmeval.engine._levels import Batches
from pytest_lmeval.engine._memory import row_bytes
from pytest_lmeval.engine._prefix_cache import PrefixCache
from pytest_lmeval.engine._results import NOTHING_READ, Deferred, Results, Scored
from pytest_lmeval.engine._row_pool import Waiting, answer_in_rows
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.engine._tree import Node, Request

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine

HELD = 64 << 20  # bytes of the states of nodes that are read side by side, if they are more than the rows of a call


OnLeaves: TypeAlias = "Callable[[list[Branch]], None]"


class Joined:
    """Scores and generates over the prefix tree of each block of requests."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = weakref.proxy(engine)  # no reference cycle: states are freed with the engine, not at a collection
        self.policy = engine.policy
        self.prefix_cache = PrefixCache()
        select = selection(engine.lm)
        assert select is not None
        self._select = select

    def score(self, requests: Sequence[Request], results: Results[Scored]) -> list[Scored]:
        reader, limits = NodeReader(self.engine, requests, results), with_states(self.engine, requests)

        def batches(leaves: Sequence[Node], begun: bool, call: int) -> list[list[int]]:
            return padded_batches(leaves, limits, self.engine, call)

        def score_leaves(batch: list[Branch]) -> None:
            reader.read_padded([branch.node for branch in batch], self._before(batch))

        self._walk(reader, limits, batches, score_leaves)
        return reader.scored

    def generate(self, answers: Sequence[Answer], choose: Choose, results: Results[Answer]) -> None:
        prompts = [Request(answer.prompt.ids, len(answer.prompt.ids)) for answer in answers]
        reader, limits = NodeReader(self.engine, prompts, Results()), with_states(self.engine, prompts)
        rows = self.policy.batch_size

        def groups(leaves: Sequence[Node], begun: bool, call: int) -> list[list[int]]:
            longest_first = sorted(range(len(leaves)), key=lambda number: -len(leaves[number].ids))
            alone = [number for number in longest_first if not begun and len(leaves[number].ids) == 1]  # they have no state
            others = longest_first[: len(leaves) - len(alone)]
            sizes = ((others, TURNS * rows), (alone, rows))
            return [some[begin : begin + size] for some, size in sizes for begin in range(0, len(some), size)]

        def answer_group(group: list[Branch]) -> None:
            left = dict(enumerate(group))
            lengths = [len(branch.node.ids) - 1 for branch in group]  # the last token is read with the answers
            for members, length in cheapest_steps(lengths, [None] * len(group), [branch.begun for branch in group], limits):
                after = self._advanced(reader, [left[number] for number in members], length)
                left |= dict(zip(members, after, strict=True))
            numbers = [branch.node.owner for branch in group]
            waiting = [Waiting(answers[node.owner], before, row, int(node.ids[0])) for node, before, row in left.values()]
            generate = partial(answer_in_rows, self.engine, self._select, waiting, choose)
            answer_batch(self.engine, numbers, [answers[number] for number in numbers], results, generate)

        self._walk(reader, limits, groups, answer_group)
        for answer, shared in zip(answers, reader.scored, strict=True):
            answer.read += shared.read

    def _walk(self, reader: NodeReader, limits: Limits, batches: Batches, on_leaves: OnLeaves) -> None:
        """Read the prefix tree of a block, and call `on_leaves` for batches of the leaves."""
        trees = self.prefix_cache.begin(reader.requests, 0)
        self._visit(reader, limits, [Branch(node, state, 0) for state, nodes in trees for node in nodes], batches, on_leaves)
        self.prefix_cache.end()

    def _visit(self, reader: NodeReader, limits: Limits, branches: list[Branch], batches: Batches, on_leaves: OnLeaves) -> None:
        """Read trees, as many of them side by side as there is memory for the states of their nodes."""
        inner, _ = lanes([branch.node for branch in branches])
        longest = max((node.end for node in inner), default=0)
        most = max(limits.rows, HELD // max(1, row_bytes(self.engine.lm, longest)))
        if len(inner) <= most:
            self._read(reader, limits, branches, batches, on_leaves)
        elif len(branches) > 1:
            half = len(branches) // 2
            for some in (branches[:half], branches[half:]):
                self._visit(reader, limits, some, batches, on_leaves)
        else:
            (trunk,) = branches
            if length := max(0, len(trunk.node.ids) - trunk.node.end % self.policy.multiple):
                branches = self._advanced(reader, branches, length)
            below = [Branch(child, before, row) for node, before, row in branches for child in node.pushed()]
            self._visit(reader, limits, below, batches, on_leaves)

    def _read(self, reader: NodeReader, limits: Limits, branches: list[Branch], batches: Batches, on_leaves: OnLeaves) -> None:
        """Read trees side by side."""
        plan = planned(branches, limits, self.policy.call, self.policy.multiple, batches)
        nodes = [branch.node for branch in plan.forest]
        numbers = {id(node): number for number, node in enumerate(lanes(nodes)[0])}
        left, leaves = dict[int, Branch](), dict[int, Branch]()

        def follow(following: Iterable[Branch]) -> None:
            for branch in following:
                if branch.node.children:
                    left[numbers[id(branch.node)]] = branch
                else:
                    leaves[id(branch.node)] = branch

        follow(plan.forest)
        for members, length in plan.steps:
            after = self._advanced(reader, [left.pop(number) for number in members], length)
            left |= {number: branch for number, branch in zip(members, after, strict=True) if len(branch.node.ids)}
            ended = [branch for branch in after if not len(branch.node.ids)]
            follow(Branch(child, before, row) for node, before, row in ended for child in node.children)
        for batch in plan.leaves:
            on_leaves([leaves.pop(id(node)) for node in batch])
        self.prefix_cache.settle()  # else it would keep all rows of the states

    def _advanced(self, reader: NodeReader, branches: list[Branch], length: int) -> list[Branch]:
        """What is left of nodes after a step that reads so many tokens of each."""
        heads, rests = zip(*(branch.node.split(length) for branch in branches), strict=True)
        ids = torch.stack([torch.from_numpy(head.ids) for head in heads])
        state = reader.read(list(heads), ids, self._before(branches))
        for row, rest in enumerate(rests):
            if rest.last and rest.children and not len(rest.ids):
                self.prefix_cache.keep(reader.requests[rest.owner].ids[: rest.start], state.then(partial(self._row, row)))
        return [Branch(rest, state, row) for row, rest in enumerate(rests)]

    def _before(self, branches: Sequence[Branch]) -> Deferred:
        """The state that these nodes continue, a row each."""
        if not branches[0].begun:
            return NOTHING_READ
        grouped = groupby(branches, key=lambda branch: id(branch.before))
        parts = [(some[0].before, [branch.row for branch in some]) for some in (list(same) for _, same in grouped)]
        return Deferred(lambda: self._select.join([(before.get(), rows) for before, rows in parts]))

    def _row(self, row: int, state: object) -> object:
        return self._select(state, [row])
