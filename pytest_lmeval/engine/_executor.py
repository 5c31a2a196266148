"""Read batches of sequences: the protocol of executors, and the one that reads each sequence from its beginning."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pytest_lmeval.engine._batches import Limits, padded_parts
from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._losses import score
from pytest_lmeval.engine._memory import most_logits, row_bytes
from pytest_lmeval.engine._policy import Policy
from pytest_lmeval.engine._results import NOTHING_READ, Deferred, Results, Scored
from pytest_lmeval.engine._tree import Node, Request, Span, tree
from pytest_lmeval.models._model import State

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine

Choose: TypeAlias = "Callable[[Tensor, list[Answer]], None]"
"""(logits [b, v], b answers): choose the next token of each answer, or end it."""

STATES_BUDGET = 1 << 30  # bytes that the states of a batch may take
TURNS = 4  # answers that follow one another in each place of a batch


class Executor(Protocol):
    """Reads sequences of one model: those whose results are not there, and adds each to the results as it ends."""

    def score(self, requests: Sequence[Request], results: Results[Scored]) -> list[Scored]:
        """The log-likelihood of each requested token, in the order of the requests."""

    def generate(self, answers: Sequence[Answer], choose: Choose, results: Results[Answer]) -> None:
        """Generate each answer until it ends (`Answer.why`), with `choose` or by filling it in."""


class NodeReader:
    """Reads the nodes of a tree of requests and collects the requested log-likelihoods.

    What is counted is what the tree takes, whether it is read now or was read by an interrupted run.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], results: Results[Scored]) -> None:
        self.engine, self.requests, self.results = engine, requests, results
        self.scored = [Scored(np.full(request.asked, np.nan)) for request in requests]
        self._left = [request.asked for request in requests]  # tokens of each that the tree has not reached yet
        self._parts: list[list[Deferred]] = [[] for _ in requests]  # what reads those that it has reached
        self._there: set[int] = set()  # those whose results stay as they are, even if others need their tokens

    def read_padded(self, nodes: list[Node], before: Deferred) -> None:
        """Read whole nodes that nothing continues in a padded batch; row i of the state is before node i."""
        ids = pad_sequence([torch.from_numpy(node.ids) for node in nodes], batch_first=True)
        self.plan(nodes, ids.numel(), Deferred(lambda: (self._read(nodes, ids, before.get()), None)[1]))

    def read(self, nodes: list[Node], ids: Tensor, before: Deferred) -> Deferred:
        """Read `ids` [b, t], which hold the nodes; row i of the state `before` is before node i. Returns the new state."""
        return self.plan(nodes, ids.numel(), Deferred(lambda: self._read(nodes, ids, before.get())))

    def plan(self, nodes: list[Node], size: int, reading: Deferred) -> Deferred:
        """Count what is read in a step of `size` tokens with padding, and read it now if a request is complete with it whose
        result is not there; else it is read when its state is asked for."""
        tokens, complete = sum(len(node.ids) for node in nodes), []
        self.engine.counts.add(tokens, size - tokens)
        for node in nodes:
            self.scored[node.owner].read += len(node.ids)
            for number, begin, end in node.wanted:
                self._parts[number].append(reading)
                self._left[number] -= end - begin
                if not self._left[number]:
                    complete.append(number)
        if (found := self.results.of(complete)) is not None:
            for number, scored in zip(complete, found, strict=True):
                self.scored[number] = replace(scored)  # more may be read for it, if others continue it
                self.engine.counts.hold(scored.state_bytes)
            self._there.update(complete)
        else:
            for part in (part for number in complete for part in self._parts[number]):
                part.get()
            for number in complete:
                self.scored[number].state_bytes = self.engine.counts.peak_state_bytes
            self.results.add({number: replace(self.scored[number]) for number in complete})
        for number in complete:
            self._parts[number] = []
        return reading

    def _read(self, nodes: list[Node], ids: Tensor, state: State) -> State:
        width = ids.shape[1]
        first = min((first_wanted(node) for node in nodes), default=width)
        skipped = min(first, width - 1)  # keep at least one position: a model may return all logits for keep=0
        logits, state = self.engine.prefill(ids.to(self.engine.lm.device), state, keep=width - skipped)
        rows, columns, spans = self.wanted(nodes)
        if spans:
            row, column = (torch.from_numpy(array).to(logits.device) for array in (rows, columns - skipped))
            self.record(spans, logits[row, column])
        self.engine.counts.hold(state)
        return state

    def wanted(self, nodes: list[Node]) -> tuple[np.ndarray, np.ndarray, list[Span]]:
        """The number of the node and the index in it of each token whose logits are wanted, and the spans that these form."""
        found = [(row, node, span) for row, node in enumerate(nodes) for span in node.wanted if span[0] not in self._there]
        rows = [np.full(end - begin, row) for row, _, (_, begin, end) in found]
        columns = [np.arange(begin, end) - node.start for _, node, (_, begin, end) in found]
        nothing = np.empty(0, dtype=np.int64)
        return np.concatenate([nothing, *rows]), np.concatenate([nothing, *columns]), [span for *_, span in found]

    def record(self, spans: list[Span], logits: Tensor) -> None:
        """Score the tokens after the positions of the spans by the logits [n, v] there."""
        targets = np.concatenate([self.requests[number].ids[begin + 1 : end + 1] for number, begin, end in spans])
        nll, rank = score(logits, torch.from_numpy(targets).to(logits.device))
        last = 0
        for number, begin, end in spans:
            scored, context, part = self.scored[number], self.requests[number].context_len, slice(last, last + end - begin)
            scored.loglikelihood[begin + 1 - context : end + 1 - context] = -nll[part]
            scored.greedy = scored.greedy and not rank[part].any()
            last += end - begin


def limits_of(policy: Policy, requests: Sequence[Request]) -> Limits:
    """The most of a block that a call may read: as many tokens as its longest sequences in a whole batch, in more rows if they
    are short."""
    return Limits(policy.short_rows, policy.batch_size * _longest(requests))


def with_states(engine: Engine, requests: Sequence[Request]) -> Limits:
    """The same of rows that continue states, which have to fit."""
    limits = limits_of(engine.policy, requests)
    held = STATES_BUDGET // max(1, row_bytes(engine.lm, _longest(requests)))
    return limits._replace(rows=max(1, min(limits.rows, held)))


def _longest(requests: Sequence[Request]) -> int:
    return max((len(request.read) for request in requests), default=1)


def padded_batches(nodes: Sequence[Node], limits: Limits, engine: Engine, call: int) -> list[list[int]]:
    """The numbers of the nodes that are read together, longest first, padded to the length of the longest, if a call costs so
    many tokens."""
    longest_first = sorted(range(len(nodes)), key=lambda number: -len(nodes[number].ids))
    ordered = [nodes[number] for number in longest_first]
    lengths, firsts = [len(node.ids) for node in ordered], [first_wanted(node) for node in ordered]
    parts = padded_parts(lengths, firsts, limits, call, most_logits(engine.lm))
    return [[longest_first[index] for index in part] for part in parts]


def first_wanted(node: Node) -> int:
    """The index in the node of the first token whose logits are wanted; its length if none are."""
    return min((begin - node.start for _, begin, _ in node.wanted), default=len(node.ids))


class Whole:
    """Scores and generates without a state. A request whose tokens are a prefix of another's is scored with that one."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = weakref.proxy(engine)  # no reference cycle: models are freed with the engine, not at a collection

    def score(self, requests: Sequence[Request], results: Results[Scored]) -> list[Scored]:
        reader, engine = NodeReader(self.engine, requests, results), self.engine
        leaves = tree(requests, step=inf)
        for batch in padded_batches(leaves, limits_of(engine.policy, requests), engine, engine.policy.call):
            reader.read_padded([leaves[number] for number in batch], NOTHING_READ)
        return reader.scored

    def generate(self, answers: Sequence[Answer], choose: Choose, results: Results[Answer]) -> None:
        """Read the whole text again for each token."""
        longest_first = sorted(range(len(answers)), key=lambda number: -len(answers[number].prompt.ids))
        size = self.engine.policy.batch_size
        for begin in range(0, len(answers), size):
            numbers = longest_first[begin : begin + size]
            rows = [answers[number] for number in numbers]
            answer_batch(self.engine, numbers, rows, results, partial(self._answer, rows, choose))

    def _answer(self, rows: list[Answer], choose: Choose) -> None:
        while rows:
            texts = [torch.tensor([*row.prompt.ids.tolist(), *row.ids]) for row in rows]
            lengths = torch.tensor(list(map(len, texts)))
            ids, skipped, tokens = pad_sequence(texts, batch_first=True), int(lengths.min()) - 1, int(lengths.sum())
            self.engine.counts.add(tokens, ids.numel() - tokens)
            logits, state = self.engine.prefill(ids.to(self.engine.lm.device), keep=ids.shape[1] - skipped)
            self.engine.counts.hold(state)
            for row, text in zip(rows, texts, strict=True):
                row.read += len(text)
            last = (lengths - 1 - skipped).to(logits.device)
            choose(logits[torch.arange(len(rows), device=logits.device), last], rows)
            rows = [row for row in rows if not row.why]


def answer_batch(
    engine: Engine, numbers: Sequence[int], rows: Sequence[Answer], results: Results[Answer], generate: Callable[[], None]
) -> None:
    """Take the answers of a batch from the results, or `generate` all of them and add them. The first of them carries what the
    batch cost."""
    if (found := results.of(numbers)) is not None:
        for row, answer in zip(rows, found, strict=True):
            row.take(answer)
            engine.counts.include(answer.counts)
        return
    before = replace(engine.counts)
    generate()
    rows[0].counts = engine.counts.since(before)
    results.add(dict(zip(numbers, rows, strict=True)))
