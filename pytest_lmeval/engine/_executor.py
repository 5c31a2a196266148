"""Executors: the protocol, and what `Forked` and `Whole` share: nodes in batches, padded, read and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._losses import score
from pytest_lmeval.engine._policy import LOGITS_BUDGET
from pytest_lmeval.engine._tree import Node, Request
from pytest_lmeval.models._model import State, state_bytes

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine

PADDING_ID = 0
PADDED = 1 / 16  # of a batch may be padding

Choose: TypeAlias = "Callable[[Tensor, list[Answer]], None]"
"""(logits [b, v], b answers): choose a token for each answer from the logits after all that it has read, or end it."""


@dataclass
class Scored:
    """What is known of one request.

    loglikelihood  [n - context_len] float64, nats, of each token that was asked for
    greedy         whether each of them is what the model would have said first
    read           tokens that were read for it, and for no request before it
    """

    loglikelihood: np.ndarray
    greedy: bool = True
    read: int = 0


@dataclass
class Counts:
    """What reading took: tokens, padding beside them, and the largest state in bytes."""

    tokens: int = 0
    padding: int = 0
    peak_state_bytes: int = 0

    def add(self, tokens: int, padding: int, state: State) -> None:
        self.tokens, self.padding = self.tokens + tokens, self.padding + padding
        self.peak_state_bytes = max(self.peak_state_bytes, state_bytes(state))


class Executor(Protocol):
    """Reads sequences of one model, in a way of its own."""

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """The log-likelihood of each token that is asked for, in the order of the requests."""

    def generate(self, answers: Sequence[Answer], choose: Choose) -> None:
        """Generate each answer until it ends (`Answer.why`): by `choose`, or by filling it in."""


class NodeReader:
    """Reads the nodes of a tree of requests, and notes down the log-likelihoods that are wanted."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine, self.requests = engine, requests
        self.scored = [Scored(np.full(request.asked, np.nan)) for request in requests]

    def read_padded(self, nodes: list[Node], state: State) -> None:
        """Read nodes to their ends, the longest first, each after a row of the state."""
        ids = torch.full((len(nodes), len(nodes[0].ids)), PADDING_ID)
        for row, node in enumerate(nodes):
            ids[row, : len(node.ids)] = torch.from_numpy(node.ids)
        self.read(nodes, ids, state)

    def read(self, nodes: list[Node], ids: Tensor, state: State) -> State:
        """Read `ids` [b, t], which hold the nodes, each after a row of the state. Returns the new state."""
        width = ids.shape[1]
        first = min((first_wanted(node) for node in nodes), default=width)
        skipped = min(first, width - 1)  # the last position always has logits: a model may take 0 of them for all
        logits, state = self.engine.prefill(ids.to(self.engine.lm.device), state, keep=width - skipped)
        wanted = [(row, node, *span) for row, node in enumerate(nodes) for span in node.wanted]
        if wanted:
            self._note(wanted, logits, skipped)
        for node in nodes:
            self.scored[node.owner].read += len(node.ids)
        tokens = sum(len(node.ids) for node in nodes)
        self.engine.counts.add(tokens, ids.numel() - tokens, state)
        return state

    def _note(self, wanted: list[tuple[int, Node, int, int, int]], logits: Tensor, skipped: int) -> None:
        """wanted  (row, node, request, first position, end): the logits there are about the tokens that follow"""
        lengths = [end - begin for *_, begin, end in wanted]
        rows = np.repeat([row for row, *_ in wanted], lengths)
        positions = np.concatenate([np.arange(begin, end) - node.start - skipped for _, node, _, begin, end in wanted])
        targets = np.concatenate([self.requests[number].ids[begin + 1 : end + 1] for _, _, number, begin, end in wanted])
        index, column, target = (torch.from_numpy(array).to(logits.device) for array in (rows, positions, targets))
        nll, rank = score(logits[index, column], target)
        ends = np.cumsum(lengths)
        for (_, _, number, begin, end), last in zip(wanted, ends, strict=True):
            scored, context, part = self.scored[number], self.requests[number].context_len, slice(last - (end - begin), last)
            scored.loglikelihood[begin + 1 - context : end + 1 - context] = -nll[part]
            scored.greedy = scored.greedy and not rank[part].any()


def batches(nodes: Sequence[tuple[Node, int]], most: int, vocab_size: int | None = None) -> Iterator[list[tuple[Node, int]]]:
    """Nodes, with the row that each follows, longest first, at most so many side by side. Where they are padded, since a
    vocabulary is given, no batch is more padding than PADDED, and its logits fit the memory."""
    batch: list[tuple[Node, int]] = []
    padding = 0
    for branch in sorted(nodes, key=lambda branch: -len(branch[0].ids)):
        more = len(batch[0][0].ids) - len(branch[0].ids) if batch else 0
        if batch and (len(batch) == most or (vocab_size and _too_full([*batch, branch], padding + more, vocab_size))):
            yield batch
            batch, padding, more = [], 0, 0
        batch.append(branch)
        padding += more
    if batch:
        yield batch


def _too_full(batch: list[tuple[Node, int]], padding: int, vocab_size: int) -> bool:
    """Whether the last row of a batch had better stand in the next one."""
    width = len(batch[0][0].ids)
    logits = len(batch) * (width - min(first_wanted(node) for node, _ in batch)) * vocab_size
    return padding > PADDED * len(batch) * width or 12 * logits > LOGITS_BUDGET


def first_wanted(node: Node) -> int:
    """The index in the node of the first token whose logits are wanted; its length if none are."""
    return min((begin - node.start for _, begin, _ in node.wanted), default=len(node.ids))
