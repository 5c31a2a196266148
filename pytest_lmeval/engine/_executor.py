"""Read batches of sequences: the protocol of executors, and the one that reads each sequence from its beginning."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._losses import score
from pytest_lmeval.engine._policy import LOGITS_BUDGET
from pytest_lmeval.engine._tree import Node, Request, tree
from pytest_lmeval.models._model import State, state_bytes

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine

PADDING_ID = 0
PADDED = 1 / 16  # the largest fraction of a batch that is padding

Choose: TypeAlias = "Callable[[Tensor, list[Answer]], None]"
"""(logits [b, v], b answers): choose the next token of each answer, or end it."""
Branches: TypeAlias = "list[tuple[Node, int]]"
"""Nodes, each with the row of a state that it continues."""


@dataclass
class Scored:
    """The result of one request.

    loglikelihood  [n - context_len] float64, nats, of each requested token
    greedy         whether each of them is the model's first choice
    read           tokens read for this request and for none before it
    """

    loglikelihood: np.ndarray
    greedy: bool = True
    read: int = 0


@dataclass
class Counts:
    """Tokens read, padding beside them, and the largest state in bytes."""

    tokens: int = 0
    padding: int = 0
    peak_state_bytes: int = 0

    def add(self, tokens: int, padding: int, state: State) -> None:
        self.tokens, self.padding = self.tokens + tokens, self.padding + padding
        self.peak_state_bytes = max(self.peak_state_bytes, state_bytes(state))


class Executor(Protocol):
    """Reads sequences of one model."""

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """The log-likelihood of each requested token, in the order of the requests."""

    def generate(self, answers: Sequence[Answer], choose: Choose) -> None:
        """Generate each answer until it ends (`Answer.why`), with `choose` or by filling it in."""


class NodeReader:
    """Reads the nodes of a tree of requests and collects the requested log-likelihoods."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine, self.requests = engine, requests
        self.scored = [Scored(np.full(request.asked, np.nan)) for request in requests]

    def read_padded(self, branches: Branches, state: State) -> None:
        """Read whole nodes, the longest first; row i of the state is before node i."""
        nodes = [node for node, _ in branches]
        ids = torch.full((len(nodes), len(nodes[0].ids)), PADDING_ID)
        for row, node in enumerate(nodes):
            ids[row, : len(node.ids)] = torch.from_numpy(node.ids)
        self.read(nodes, ids, state)

    def read(self, nodes: list[Node], ids: Tensor, state: State) -> State:
        """Read `ids` [b, t], which hold the nodes; row i of the state is before node i. Returns the new state."""
        width = ids.shape[1]
        first = min((first_wanted(node) for node in nodes), default=width)
        skipped = min(first, width - 1)  # keep at least one position: a model may return all logits for keep=0
        logits, state = self.engine.prefill(ids.to(self.engine.lm.device), state, keep=width - skipped)
        wanted = [(row, node, *span) for row, node in enumerate(nodes) for span in node.wanted]
        if wanted:
            self._record(wanted, logits, skipped)
        for node in nodes:
            self.scored[node.owner].read += len(node.ids)
        tokens = sum(len(node.ids) for node in nodes)
        self.engine.counts.add(tokens, ids.numel() - tokens, state)
        return state

    def _record(self, wanted: list[tuple[int, Node, int, int, int]], logits: Tensor, skipped: int) -> None:
        """wanted  (row, node, request, first position, end): the logits there predict the tokens that follow"""
        lengths = [end - begin for *_, begin, end in wanted]
        rows = np.repeat([row for row, *_ in wanted], lengths)
        positions = np.concatenate([np.arange(begin, end) - node.start - skipped for _, node, _, begin, end in wanted])
        targets = np.concatenate([self.requests[number].ids[begin + 1 : end + 1] for _, _, number, begin, end in wanted])
        row, column, target = (torch.from_numpy(array).to(logits.device) for array in (rows, positions, targets))
        nll, rank = score(logits[row, column], target)
        ends = np.cumsum(lengths)
        for (_, _, number, begin, end), last in zip(wanted, ends, strict=True):
            scored, context, part = self.scored[number], self.requests[number].context_len, slice(last - (end - begin), last)
            scored.loglikelihood[begin + 1 - context : end + 1 - context] = -nll[part]
            scored.greedy = scored.greedy and not rank[part].any()


def batches(branches: Branches, most: int, vocab_size: int | None = None) -> Iterator[Branches]:
    """Batches of at most `most` nodes, longest first. With a `vocab_size` the nodes are padded: a batch is then at most PADDED
    padding, and its logits fit the memory."""
    batch: Branches = []
    padding = 0
    for branch in sorted(branches, key=lambda branch: -len(branch[0].ids)):
        more = len(batch[0][0].ids) - len(branch[0].ids) if batch else 0
        if batch and (len(batch) == most or (vocab_size and _too_full([*batch, branch], padding + more, vocab_size))):
            yield batch
            batch, padding, more = [], 0, 0
        batch.append(branch)
        padding += more
    if batch:
        yield batch


def _too_full(batch: Branches, padding: int, vocab_size: int) -> bool:
    """Whether the last row of a batch should go into the next one."""
    width = len(batch[0][0].ids)
    logits = len(batch) * (width - min(first_wanted(node) for node, _ in batch)) * vocab_size
    return padding > PADDED * len(batch) * width or 12 * logits > LOGITS_BUDGET


def first_wanted(node: Node) -> int:
    """The index in the node of the first token whose logits are wanted; its length if none are."""
    return min((begin - node.start for _, begin, _ in node.wanted), default=len(node.ids))


class Whole:
    """Scores and generates in batches, for models without a state, or whose state may not be continued. A request whose tokens
    are a prefix of another's is scored with that one."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = weakref.proxy(engine)  # no reference cycle: models are freed with the engine, not at a collection

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        reader, engine = NodeReader(self.engine, requests), self.engine
        leaves = [(node, 0) for node in tree(requests, step=inf)]
        for batch in batches(leaves, engine.policy.batch_size, engine.lm.vocab_size):
            reader.read_padded(batch, None)
        return reader.scored

    def generate(self, answers: Sequence[Answer], choose: Choose) -> None:
        """Read the whole text again for each token."""
        size = self.engine.policy.batch_size
        longest_first = sorted(answers, key=lambda row: -len(row.prompt.ids))
        for begin in range(0, len(answers), size):
            rows = longest_first[begin : begin + size]
            while rows:
                self._read_again(rows, choose)
                rows = [row for row in rows if not row.why]

    def _read_again(self, rows: list[Answer], choose: Choose) -> None:
        texts = [[*row.prompt.ids.tolist(), *row.ids] for row in rows]
        width, shortest = max(map(len, texts)), min(map(len, texts))
        ids = torch.full((len(rows), width), PADDING_ID)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        logits, state = self.engine.prefill(ids.to(self.engine.lm.device), keep=width - shortest + 1)
        tokens = sum(map(len, texts))
        self.engine.counts.add(tokens, ids.numel() - tokens, state)
        last = torch.tensor([len(text) - shortest for text in texts], device=logits.device)
        for answer, text in zip(rows, texts, strict=True):
            answer.read += len(text)
        choose(logits[torch.arange(len(rows), device=logits.device), last], rows)
