"""Reads each sequence from its beginning, in batches: for a model whose state may not be continued, or that has none."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch

from pytest_lmeval.engine._executor import PADDING_ID, Block, Hear, Scored, batches
from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._tree import Request, tree

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine


class Whole:
    """See the head of this file. A request that reads only what another reads too is scored with it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        block, engine = Block(self.engine, requests), self.engine
        leaves = [(node, 0) for node in tree(requests, step=inf)]
        for batch in batches(leaves, engine.policy.batch_size, engine.lm.vocab_size):
            block.read_padded([node for node, _ in batch], None)
        return block.scored

    def generate(self, answers: Sequence[Answer], hear: Hear) -> None:
        """Everything is read anew for each token."""
        size = self.engine.policy.batch_size
        longest_first = sorted(answers, key=lambda row: -len(row.prompt.ids))
        for begin in range(0, len(answers), size):
            rows = longest_first[begin : begin + size]
            while rows:
                self._read_again(rows, hear)
                rows = [row for row in rows if not row.why]

    def _read_again(self, rows: list[Answer], hear: Hear) -> None:
        texts = [[*row.prompt.ids.tolist(), *row.ids] for row in rows]
        width, shortest = max(map(len, texts)), min(map(len, texts))
        ids = torch.full((len(rows), width), PADDING_ID)
        for place, text in enumerate(texts):
            ids[place, : len(text)] = torch.tensor(text)
        logits, state = self.engine.prefill(ids.to(self.engine.lm.device), keep=width - shortest + 1)
        self.engine.counts.add(ids.numel(), 0, state)
        last = torch.tensor([len(text) - shortest for text in texts], device=logits.device)
        for row, text in zip(rows, texts, strict=True):
            row.read += len(text)
        hear(logits[torch.arange(len(rows), device=logits.device), last], rows)
