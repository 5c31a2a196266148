"""Read each distinct prefix once, and fork the state after it for the sequences that continue it.

Rows of a batch have read the same number of tokens, since a state may grow with each (`_levels`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, TypeAlias

import torch

from pytest_lmeval.engine._batches import Limits
from pytest_lmeval.engine._executor import Choose, NodeReader, answer_batch, limits_of, padded_batches, with_states
from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._levels import Batches, Branches, Level, Reading, planned
from pytest_lmeval.engine._prefix_cache import Keep, PrefixCache
from pytest_lmeval.engine._results import NOTHING_READ, Deferred, Results, Scored
from pytest_lmeval.engine._state_rows import Selection, selection
from pytest_lmeval.engine._tree import Node, Request
from pytest_lmeval.models._model import State, fork

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine

OnLeaves: TypeAlias = "Callable[[Deferred, Branches], None]"


class Forked:
    """Scores and generates over the prefix tree of each block of requests."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = weakref.proxy(engine)  # no reference cycle: states are freed with the engine, not at a collection
        self.policy = engine.policy
        self.prefix_cache = PrefixCache()
        self._select = selection(engine.lm)
        self._step = 0 if self.policy.share else inf

    def score(self, requests: Sequence[Request], results: Results[Scored]) -> list[Scored]:
        reader, limits = NodeReader(self.engine, requests, results), limits_of(self.policy, requests)
        side_by_side = self._divisible(requests)

        def batches(leaves: Sequence[Node], begun: bool, call: int) -> list[list[int]]:
            return padded_batches(leaves, side_by_side if begun else limits, self.engine, call)

        def score_leaves(state: Deferred, batch: Branches) -> None:
            reader.read_padded([node for node, _ in batch], self._rows(state, [row for _, row in batch]))

        self._walk(reader, self._reading(side_by_side, side_by_side, 1, batches), score_leaves)
        return reader.scored

    def generate(self, answers: Sequence[Answer], choose: Choose, results: Results[Answer]) -> None:
        prompts = [Request(answer.prompt.ids, len(answer.prompt.ids)) for answer in answers]
        reader, limits = NodeReader(self.engine, prompts, Results()), self._divisible(prompts)
        size = min(self.policy.batch_size, limits.rows)

        def batches(leaves: Sequence[Node], begun: bool, call: int) -> list[list[int]]:
            longest_first = sorted(range(len(leaves)), key=lambda number: -len(leaves[number].ids))
            return [longest_first[begin : begin + size] for begin in range(0, len(leaves), size)]

        def answer_leaves(state: Deferred, batch: Branches) -> None:
            before = self._rows(state, [row for _, row in batch])
            rows = [(answers[node.owner], node.ids.tolist()) for node, _ in batch]
            generate = partial(self._begin_answers, before, rows, choose)
            answer_batch(self.engine, [node.owner for node, _ in batch], [row for row, _ in rows], results, generate)

        calls = 1 + max((answer.prompt.max_tokens for answer in answers), default=0)
        self._walk(reader, self._reading(limits, limits._replace(rows=size), calls, batches), answer_leaves)
        for answer, shared in zip(answers, reader.scored, strict=True):
            answer.read += shared.read

    def _reading(self, inner: Limits, leaves: Limits, calls: int, batches: Batches) -> Reading:
        return Reading(inner, leaves, self.policy.call, calls, self.policy.multiple, batches)

    def _divisible(self, requests: Sequence[Request]) -> Limits:
        """The limits of batches whose rows continue a state."""
        limits = with_states(self.engine, requests)
        return limits if self._select is not None else limits._replace(rows=1)

    def _walk(self, reader: NodeReader, reading: Reading, on_leaves: OnLeaves) -> None:
        """Read the prefix tree of a block. Call `on_leaves(state, batch)` for the batches of leaves."""

        def visit(state: Deferred, nodes: list[Node], keep: Keep) -> None:
            self._read(reader, planned(reading, nodes, begun=state is not NOTHING_READ), state, keep, on_leaves)

        self.prefix_cache.walk(reader.requests, self._step, visit)

    def _read(self, reader: NodeReader, level: Level, state: Deferred, keep: Keep, on_leaves: OnLeaves) -> None:
        for batch in level.leaves:
            on_leaves(state, batch)
        for batch, length, below in level.below:
            heads, rests = zip(*(node.split(length) for node, _ in batch), strict=True)
            ids = torch.stack([torch.from_numpy(head.ids) for head in heads])
            after = reader.read(list(heads), ids, self._rows(state, [row for _, row in batch]))
            for row, rest in enumerate(rests):
                if rest.last:
                    keep(reader.requests[rest.owner].ids[: rest.start], self._rows(after, [row]))
            self._read(reader, below, after, keep, on_leaves)
            del after
        self.prefix_cache.settle()  # else it would keep all rows of the batch

    def _rows(self, before: Deferred, rows: list[int]) -> Deferred:
        """A copy of these rows of a state, made at once if the state is known, so that the other rows are freed."""
        if before is NOTHING_READ:
            return before
        return before.then(partial(_copy, self._select, rows))

    def _begin_answers(self, before: Deferred, rows: list[tuple[Answer, list[int]]], choose: Choose) -> None:
        self._answer(before.get(), rows, choose)

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


def _copy(select: Selection | None, rows: Sequence[int], state: State) -> State:
    return fork(state) if select is None else select(state, rows)
