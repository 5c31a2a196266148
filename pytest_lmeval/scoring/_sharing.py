"""How likely texts are after others, each distinct beginning read once: the state after it is forked for what follows.

    scored = Sharing(lm).score(requests)     log-likelihood of each asked token, and what reading them took

The prefix tree is processed level by level: nodes that begin at the same length form a batch; leaves are padded, inner nodes
truncated to the shortest. So a model that continues exactly from a state reads every distinct token about once, in batches. A
model that does not continue exactly reads each sequence whole, and one whose rows are not independent reads each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeAlias

import numpy as np
import torch

from pytest_lmeval._stream import LOGITS_BUDGET, check_vocabulary, score
from pytest_lmeval.models._model import Model, State, fork, state_bytes
from pytest_lmeval.scoring._batch import Select, selection
from pytest_lmeval.scoring._tree import STEP, Node, Request, tree, worth_a_step

End: TypeAlias = "Callable[[State, list[tuple[Node, int]]], None]"

FILLER = 0
FILLED = 1 / 16  # of a batch may be filling
SHORT = 4  # times as many rows as a batch has, of ends that are that much shorter than what is before them
SHELF = 4  # beginnings that are remembered: examples, a passage, and what is between them
STATES_BUDGET = 1 << 30  # bytes that the states of a batch may take


@dataclass
class Scored:
    """What is known of one request.

    loglikelihood  [n - given] float64, nats, of each token that was asked for
    greedy         whether each of them is what the model would have said first
    read           tokens that were read for it, and for no request before it
    """

    loglikelihood: np.ndarray
    greedy: bool = True
    read: int = 0


@dataclass
class Sharing:
    """Reads requests of one model, block by block; what the last request of a block began with is remembered for the next.

    batch_size  whole prompts side by side at most; 1 for a model that breaks the law `rows`
    share       whether a state may be forked and gone on from with several tokens
    carry       whether it may be gone on from token by token
    multiple    that is exact only at multiples of so many tokens
    longest     step that the model can take; None is any
    tokens      read so far, and the filling beside them
    """

    lm: Model
    batch_size: int = 8
    share: bool = True
    carry: bool = True
    multiple: int = 1
    longest: int | None = None
    tokens: int = 0
    filling: int = 0
    steps: int = 0
    peak_state_bytes: int = 0
    shelf: list[tuple[np.ndarray, State]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.share = self.share and self.lm.stateful
        self.carry = self.carry and self.lm.stateful
        self._select: Select | None = selection(self.lm) if self.share or self.carry else None
        self._step = STEP if self.share else inf
        self._scored: list[Scored] = []
        self._requests: Sequence[Request] = ()
        self._end: End | None = None

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """What each request asks for, in their order. A value that is not finite is left to the caller, who knows its row."""
        for request in requests:
            check_vocabulary(request.ids, 0, self.lm)
        return self.walk(requests, None)

    def walk(self, requests: Sequence[Request], end: End | None) -> list[Scored]:
        """Process the prefix tree of the requests. Call `end(state, [(node, row of the state)])` for the leaves of each batch;
        if it is None, score the leaves."""
        self._scored = [Scored(np.full(len(request.ids) - request.given, np.nan)) for request in requests]
        self._requests, self._end = requests, end
        last = requests[-1] if requests else None
        kept = [(prefix, state) for prefix, state in self.shelf if last is not None and _begins(last, prefix)]
        for (prefix, state), members in self._by_shelf(requests):
            nodes = tree(requests, members, start=len(prefix), step=self._step)
            self._visit(state, [(node, 0) for node in nodes], kept)
        self.shelf = sorted(kept, key=lambda entry: len(entry[0]))[:SHELF]  # the shorter ones are shared by more
        return self._scored

    def _by_shelf(self, requests: Sequence[Request]) -> Iterator[tuple[tuple[np.ndarray, State], list[int]]]:
        """The requests by the longest remembered beginning that they share."""
        left = list(range(len(requests)))
        for prefix, state in sorted(self.shelf, key=lambda entry: -len(entry[0])):
            begins = {number: _begins(requests[number], prefix) for number in left}
            left = [number for number in left if not begins[number]]
            if members := [number for number, so in begins.items() if so]:
                yield (prefix, state), members
        if left:
            yield (np.empty(0, dtype=np.int64), None), left

    def _visit(self, state: State, branches: list[tuple[Node, int]], kept: list[tuple[np.ndarray, State]]) -> None:
        """Read what follows `state`: each node follows one of its rows."""
        leaves = [(node, row) for node, row in branches if not node.children]
        for batch in self._batches(leaves, state, filled=self._end is None):
            (self._end or self._read_leaves)(state, batch)
        inner = [(node, row) for node, row in branches if node.children]
        for batch in self._batches(inner, state, filled=False):
            self._visit(*self._read_alike(state, batch, kept), kept)

    def _batches(self, branches: list[tuple[Node, int]], state: State, *, filled: bool) -> Iterator[list[tuple[Node, int]]]:
        """Longest first. Where rows are filled up, no batch is more filling than FILLED."""
        most = self._rows(state, branches, filled)
        batch: list[tuple[Node, int]] = []
        filling = 0
        for branch in sorted(branches, key=lambda branch: -len(branch[0].ids)):
            more = len(batch[0][0].ids) - len(branch[0].ids) if batch else 0
            if batch and (len(batch) == most or (filled and self._too_full([*batch, branch], filling, more))):
                yield batch
                batch, filling, more = [], 0, 0
            batch.append(branch)
            filling += more
        if batch:
            yield batch

    def _too_full(self, batch: list[tuple[Node, int]], filling: int, more: int) -> bool:
        """Whether the last row of a batch, filled up by `more` tokens, had better stand in the next one."""
        width = len(batch[0][0].ids)
        logits = len(batch) * (width - min(_first_wanted(node) for node, _ in batch)) * self.lm.vocab_size
        return filling + more > FILLED * len(batch) * width or 12 * logits > LOGITS_BUDGET

    def _rows(self, state: State, branches: list[tuple[Node, int]], leaves: bool) -> int:
        """How many may stand side by side: of ends that are short, more, for they are no more tokens than whole prompts."""
        if state is None:
            alone = self._select is None and (not leaves or (self._end is not None and self.carry))
            return 1 if alone else self.batch_size
        if self._select is None or not branches:
            return 1
        bytes_of_a_row = state_bytes(state) // (1 + max(row for _, row in branches))
        most = self.batch_size
        if leaves and self._end is None and most > 1:
            longest = max(len(node.ids) for node, _ in branches)
            most *= min(SHORT, (branches[0][0].start + longest) // longest)
        return max(1, min(most, STATES_BUDGET // max(1, bytes_of_a_row)))

    def _read_leaves(self, state: State, batch: list[tuple[Node, int]]) -> None:
        width = len(batch[0][0].ids)
        ids = torch.full((len(batch), width), FILLER)
        for row, (node, _) in enumerate(batch):
            ids[row, : len(node.ids)] = torch.from_numpy(node.ids)
        self._step_and_score(state, batch, ids, [node for node, _ in batch])

    def _read_alike(
        self, state: State, batch: list[tuple[Node, int]], kept: list[tuple[np.ndarray, State]]
    ) -> tuple[State, list[tuple[Node, int]]]:
        """Read the nodes as far as the shortest of them goes; returns the state after that, and what follows its rows."""
        length = min(len(node.ids) for node, _ in batch)
        length -= (batch[0][0].start + length) % self.multiple
        if length <= 0:
            return state, [(child, row) for node, row in batch for child in node.pushed()]
        heads = [node.head(length) for node, _ in batch]
        ids = torch.stack([torch.from_numpy(head.ids) for head in heads])
        state = self._step_and_score(state, batch, ids, heads)
        following = []
        for row, (node, _) in enumerate(batch):
            rest = node.after(length)
            if not len(rest.ids):
                following += [(child, row) for child in node.children]
                if node.last:
                    beginning = self._requests[node.owner].ids[: node.end]
                    kept.append((beginning, self.taken(state, [row])))
            elif worth_a_step(len(rest.ids), rest.leaves):
                following.append((rest, row))
            else:
                following += [(child, row) for child in rest.pushed()]
        return state, following

    def _step_and_score(self, state: State, batch: list[tuple[Node, int]], ids: torch.Tensor, nodes: list[Node]) -> State:
        """Read `ids` [b, t] after rows of a state, and note down the likelihoods that are wanted."""
        width = ids.shape[1]
        first = min((_first_wanted(node) for node in nodes), default=width)
        skipped = min(first, width - 1)  # the last position always has logits: a model may take 0 of them for all
        before = None if state is None else self.taken(state, [row for _, row in batch])
        logits, state = self.step(ids, before, keep=width - skipped)
        with torch.no_grad():
            wanted = [(row, node, *want) for row, node in enumerate(nodes) for want in node.wanted]
            if wanted:
                rows = torch.tensor([want[0] for want in wanted], device=logits.device)
                places = torch.tensor([want[2] - want[1].start - skipped for want in wanted], device=logits.device)
                targets = torch.tensor([want[4] for want in wanted], device=logits.device)
                nll, rank = score(logits[rows, places], targets)
                self._note(wanted, nll, rank)
        for node in nodes:
            self._scored[node.owner].read += len(node.ids)
        filling = ids.numel() - sum(len(node.ids) for node in nodes)
        self.tokens, self.filling = self.tokens - filling, self.filling + filling
        return state

    def step(self, ids: torch.Tensor, state: State, keep: int = 1) -> tuple[torch.Tensor, State]:
        """A step of the model, counted. The state is used up."""
        left, logits = ids.shape[1], []
        for part in torch.split(ids.to(self.lm.device), self.longest or left, dim=1):
            left -= part.shape[1]
            wanted = min(max(1, keep - left), part.shape[1])
            with torch.no_grad():
                said, state = self.lm.step(part, state, keep=wanted)
            logits += [said] * (keep > left)
            self.steps += 1
        self.tokens += ids.numel()
        self.peak_state_bytes = max(self.peak_state_bytes, state_bytes(state))
        return torch.cat(logits, dim=1), state

    def _note(self, wanted: list[tuple[int, Node, int, int, int]], nll: np.ndarray, rank: np.ndarray) -> None:
        for (_, _, position, number, _), loss, better in zip(wanted, nll, rank, strict=True):
            scored = self._scored[number]
            scored.loglikelihood[position + 1 - self._requests[number].given] = -loss
            scored.greedy = scored.greedy and better == 0

    def taken(self, state: State, rows: list[int]) -> State:
        """A state of these rows, so that the one it is taken from can be taken from again."""
        return fork(state) if self._select is None else self._select(state, rows)


def _first_wanted(node: Node) -> int:
    """The place in the node of the first token whose logits are wanted; its length if none are."""
    return min((want[0] - node.start for want in node.wanted), default=len(node.ids))


def _begins(request: Request, prefix: np.ndarray) -> bool:
    """Whether a request begins with what was read before, and asks for nothing in it."""
    return request.given > len(prefix) and np.array_equal(request.ids[: len(prefix)], prefix)
