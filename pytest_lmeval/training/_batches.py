"""Choose the tokens to train and evaluate on, and their order: by text and protocol, never by the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._ids import as_corpus
from pytest_lmeval.data._tokens import TokenReader
from pytest_lmeval.engine._tokens import check_vocabulary
from pytest_lmeval.errors import CorpusError, StreamError
from pytest_lmeval.models._model import Model
from pytest_lmeval.training._protocol import Protocol


def readable_again(lm: Model, source: Corpus | Iterable[Any], limit: int) -> Corpus:
    """A corpus with a fingerprint. Reads sources without one, such as iterators, now."""
    corpus = as_corpus(source)
    if corpus.fingerprint:
        return corpus
    return replace(as_corpus(read(lm, corpus, limit)), name=corpus.name, split=corpus.split)


def read(lm: Model, corpus: Corpus, limit: int) -> np.ndarray:
    """The first `limit` tokens of a corpus, [n] int32, its documents joined; reads no further.

    Raises StreamError for a token outside the vocabulary, CorpusError for a text that cannot be read.
    """
    parts: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    start = 0
    for part in TokenReader(lm, corpus.documents(), limit=limit):
        try:
            check_vocabulary(part.ids, start, lm)
        except StreamError as error:
            raise StreamError(f"{corpus}: {error}") from None
        parts.append(part.ids.astype(np.int32))
        start += len(part)
    return np.concatenate(parts)


def steps_an_epoch(tokens: np.ndarray, protocol: Protocol, name: str) -> int:
    """The number of updates in one pass over the tokens. Raises CorpusError if they do not fill one batch."""
    steps = (len(tokens) - 1) // protocol.seq_len // protocol.batch_size
    if steps < 1:
        needed = protocol.batch_size * protocol.seq_len + 1
        cut = f" (the protocol reads at most tokens={protocol.tokens:,})" if len(tokens) == protocol.tokens else ""
        raise CorpusError(
            f"{name} gave {len(tokens):,} tokens{cut}, but one batch of {protocol.batch_size} crops of {protocol.seq_len} "
            f"tokens needs {needed:,}. Give more text, or take a smaller batch_size or seq_len."
        )
    return steps


def batches(tokens: np.ndarray, protocol: Protocol, *, first: int = 0) -> Iterator[Tensor]:
    """The batches of all updates from `first` on, without end: [batch_size, seq_len + 1] int64.

    Each epoch reads each crop once, in an order drawn from (seed, epoch), and leaves out those that fill no batch. Neighbouring
    crops have one token in common: the last target of one is the first input of the next. The beginning of the first crop is
    drawn, too, within the spare tokens.
    """
    crops = (len(tokens) - 1) // protocol.seq_len
    steps = crops // protocol.batch_size
    inside = np.arange(protocol.seq_len + 1)
    for epoch in count(first // steps):
        generator = np.random.default_rng([protocol.seed, epoch])
        offset = generator.integers(len(tokens) - crops * protocol.seq_len)
        starts = offset + protocol.seq_len * generator.permutation(crops)[: steps * protocol.batch_size]
        for batch in starts.reshape(steps, protocol.batch_size, 1)[max(0, first - epoch * steps) :]:
            yield torch.from_numpy(tokens[batch + inside].astype(np.int64))


def held_out_batches(tokens: np.ndarray, protocol: Protocol, name: str) -> list[Tensor]:
    """The crops of every evaluation, [up to batch_size, seq_len + 1] int64 each, spread evenly over the held-out tokens.

    Raises CorpusError for a text of less than one crop.
    """
    crops = (len(tokens) - 1) // protocol.seq_len
    if crops < 1:
        raise CorpusError(
            f"the held-out text {name} gave {len(tokens):,} tokens; one crop needs {protocol.seq_len + 1:,}. Give more text, "
            "or take a smaller seq_len."
        )
    wanted = min(crops, max(1, protocol.eval_tokens // protocol.seq_len))
    starts = np.linspace(0, crops - 1, wanted).round().astype(int) * protocol.seq_len
    chosen = tokens[starts[:, None] + np.arange(protocol.seq_len + 1)]
    return list(torch.from_numpy(chosen.astype(np.int64)).split(protocol.batch_size))  # type: ignore[no-untyped-call]
