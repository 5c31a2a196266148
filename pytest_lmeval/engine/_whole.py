"""Reads each sequence from its beginning, in batches: for a model whose state may not be continued, or that has none."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch

from pytest_lmeval.engine._executor import PADDING_ID, Choose, NodeReader, Scored, batches
from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._tree import Request, tree

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine


class Whole:
    """Scores and generates in batches. A request that reads only what another reads too is scored with it."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = weakref.proxy(engine)  # which holds this: models are let go with it, not at a collection

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        reader, engine = NodeReader(self.engine, requests), self.engine
        leaves = [(node, 0) for node in tree(requests, step=inf)]
        for batch in batches(leaves, engine.policy.batch_size, engine.lm.vocab_size):
            reader.read_padded([node for node, _ in batch], None)
        return reader.scored

    def generate(self, answers: Sequence[Answer], choose: Choose) -> None:
        """Everything is read anew for each token."""
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
