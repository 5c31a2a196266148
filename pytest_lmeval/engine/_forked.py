"""Read each distinct prefix once, and fork the state after it for the sequences that continue it.

The prefix tree is read level by level: nodes that begin at the same length form a batch; leaves are padded, inner nodes
truncated to the shortest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, TypeAlias

import torch

from pytest_lmeval.engine._executor import Branches, Choose, NodeReader, answer_batch, batches, padded_batches
from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._memory import most_logits, row_bytes
from pytest_lmeval.engine._prefix_cache import Keep, PrefixCache
from pytest_lmeval.engine._results import NOTHING_READ, Deferred, Results, Scored
from pytest_lmeval.engine._state_rows import Select, selection
from pytest_lmeval.engine._tree import Node, Request
from pytest_lmeval.models._model import State, fork

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine

OnLeaves: TypeAlias = "Callable[[Deferred, Branches], None]"

MORE_SHORT_LEAVES = 4  # the most that the batch size is multiplied by for leaves that are shorter than their prefix
STATES_BUDGET = 1 << 30  # bytes that the states of a batch may take


class Forked:
    """Scores and generates over the prefix tree of each block of requests."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = weakref.proxy(engine)  # no reference cycle: states are freed with the engine, not at a collection
        self.policy = engine.policy
        self.prefix_cache = PrefixCache()
        self._select = selection(engine.lm)
        self._step_cost = self.policy.call if self.policy.share else inf

    def score(self, requests: Sequence[Request], results: Results[Scored]) -> list[Scored]:
        reader = NodeReader(self.engine, requests, results)

        def score_leaves(state: Deferred, batch: Branches) -> None:
            reader.read_padded(batch, self._rows(state, [row for _, row in batch]))

        self._walk(reader, lambda state, leaves: self._each(state, leaves, score_leaves, padded=True))
        return reader.scored

    def generate(self, answers: Sequence[Answer], choose: Choose, results: Results[Answer]) -> None:
        prompts = [Request(answer.prompt.ids, len(answer.prompt.ids)) for answer in answers]
        reader = NodeReader(self.engine, prompts, Results())

        def answer_leaves(state: Deferred, batch: Branches) -> None:
            numbers, before = [node.owner for node, _ in batch], self._rows(state, [row for _, row in batch])
            rows = [(answers[node.owner], node.ids.tolist()) for node, _ in batch]
            answer_batch(
                self.engine, numbers, [row for row, _ in rows], results, lambda: self._answer(before.get(), rows, choose)
            )

        self._walk(reader, lambda state, leaves: self._each(state, leaves, answer_leaves, padded=False))
        for answer, shared in zip(answers, reader.scored, strict=True):
            answer.read += shared.read

    def _walk(self, reader: NodeReader, on_leaves: OnLeaves) -> None:
        """Read the prefix tree of a block. Call `on_leaves(state, leaves)` for the leaves that continue one state."""

        def visit(state: Deferred, nodes: list[Node], keep: Keep) -> None:
            self._visit(reader, state, [(node, 0) for node in nodes], keep, on_leaves)

        self.prefix_cache.walk(reader.requests, self._step_cost, visit)

    def _visit(self, reader: NodeReader, state: Deferred, branches: Branches, keep: Keep, on_leaves: OnLeaves) -> None:
        """Read the tree below `state`; each node continues one of its rows."""
        on_leaves(state, [(node, row) for node, row in branches if not node.children])
        inner = [(node, row) for node, row in branches if node.children]
        for batch in batches(inner, self._most(inner, self.policy.batch_size)):
            self._visit(reader, *self._read_inner(reader, state, batch, keep), keep, on_leaves)
        self.prefix_cache.settle()  # else it would keep all rows of the batch

    def _each(self, state: Deferred, leaves: Branches, read: Callable[[Deferred, Branches], None], *, padded: bool) -> None:
        """Read leaves in batches. If they are padded, short ones form larger batches, of no more tokens than whole prompts."""
        most = self.policy.batch_size
        if state is not NOTHING_READ or not padded:
            if padded and leaves and most > 1:
                longest = max(len(node.ids) for node, _ in leaves)
                most *= min(MORE_SHORT_LEAVES, (leaves[0][0].start + longest) // longest)
            most = self._most(leaves, most)
        few = padded_batches(leaves, most, self.policy.call, most_logits(self.engine.lm)) if padded else batches(leaves, most)
        for batch in few:
            read(state, batch)

    def _most(self, branches: Branches, most: int) -> int:
        """The number of branches, at most `most`, that fit in one batch and can be continued in it."""
        if self._select is None:
            return 1
        if not branches or not branches[0][0].start:
            return most
        return max(1, min(most, STATES_BUDGET // max(1, row_bytes(self.engine.lm, branches[0][0].start))))

    def _read_inner(self, reader: NodeReader, state: Deferred, batch: Branches, keep: Keep) -> tuple[Deferred, Branches]:
        """Read the nodes up to the end of the shortest; returns the state there, and the branches that continue it."""
        length = min(len(node.ids) for node, _ in batch)
        length -= (batch[0][0].start + length) % self.policy.multiple
        if length <= 0:
            return state, [(child, row) for node, row in batch for child in node.pushed()]
        heads, rests = zip(*(node.split(length) for node, _ in batch), strict=True)
        ids = torch.stack([torch.from_numpy(head.ids) for head in heads])
        state = reader.read(list(heads), ids, self._rows(state, [row for _, row in batch]))
        following: Branches = []
        shortest = self._shortest_rest(rests)
        for row, ((node, _), rest) in enumerate(zip(batch, rests, strict=True)):
            if not len(rest.ids):
                following += [(child, row) for child in node.children]
                if node.last:
                    keep(reader.requests[node.owner].ids[: node.end], self._rows(state, [row]))
            elif len(rest.ids) >= shortest:
                following.append((rest, row))
            else:
                following += [(child, row) for child in rest.pushed()]
        return state, following

    def _shortest_rest(self, rests: Sequence[Node]) -> float:
        """The length from which on the rests of nodes are read together, in a step and with leaves of their own; shorter ones
        are read again with each leaf. Infinite if that saves no more than it costs."""
        lengths = [len(rest.ids) for rest in rests]
        saved = [n * sum(rest.leaves - 1 for rest in rests if len(rest.ids) >= n) for n in lengths]
        most, length = max(zip(saved, lengths, strict=True))
        return length if most > 2 * self._step_cost else inf

    def _rows(self, before: Deferred, rows: list[int]) -> Deferred:
        """A copy of these rows of a state, made at once if the state is known, so that the other rows are freed."""
        if before is NOTHING_READ:
            return before
        return before.then(partial(_copy, self._select, rows))

    def _answer(self, state: State, rows: list[tuple[Answer, list[int]]], choose: Choose) -> None:
        """Generate answers, each with the prompt ids that it has still to read, until all have ended. Since a state has one
        length, all rows have read the same number of tokens: while one generates, another may still read its prompt."""
        begun = False
        while rows:
            length = 1 if begun and self.policy.single else min(len(ids) for _, ids in rows)
            begun = True
            input_ids = torch.tensor([ids[:length] for _, ids in rows])
            self.engine.counts.add(input_ids.numel(), 0)
            logits, state = self.engine.prefill(input_ids.to(self.engine.lm.device), state)
            self.engine.counts.hold(state)
            for answer, ids in rows:
                answer.read += length
                del ids[:length]
            answering = [row for row, (_, ids) in enumerate(rows) if not ids]
            choose(logits[answering, -1], [rows[row][0] for row in answering])
            staying = [row for row, (answer, _) in enumerate(rows) if not answer.why]
            for row in set(answering) & set(staying):
                rows[row][1].append(rows[row][0].ids[-1])
            if len(staying) < len(rows):
                rows = [rows[row] for row in staying]
                state = _copy(self._select, staying, state) if rows else None


def _copy(select: Select | None, rows: Sequence[int], state: State) -> State:
    return fork(state) if select is None else select(state, rows)
