"""Plan a training: check that model, texts and protocol go together, and choose the tokens, whatever the model."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._tokens import TokenReader, as_corpus, model_for
from pytest_lmeval.engine._tokens import check_vocabulary
from pytest_lmeval.errors import CorpusError, ProtocolError, SpecError, StreamError
from pytest_lmeval.models._identity import fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._journal import key_of
from pytest_lmeval.training._protocol import Protocol

COARSE = (torch.bfloat16, torch.float16)
Source: TypeAlias = "Corpus | str | Iterable[Any]"


@dataclass(frozen=True)
class Plan:
    """A training before it begins.

    lm          the model that is copied and trained
    subject     the name of what it learns
    decided_by  what decides the outcome beside model and protocol: texts or questions, the tokenizer
    names       the same in names that people know
    spec        name of the trained model; None: one that says what was done
    partial     frozen parameters are neither copied nor saved
    """

    lm: Model
    subject: str
    protocol: Protocol
    decided_by: dict[str, Any]
    names: dict[str, Any]
    spec: str | None = None
    partial: bool = False

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the outcome."""
        parameters = () if self.lm.module is None else self.lm.module.named_parameters()
        return {
            "protocol": self.protocol.to_json(),
            "lm": [fingerprint(self.lm), str(self.lm.dtype), str(self.lm.device)],
            "frozen": [name for name, parameter in parameters if not parameter.requires_grad],
            **self.decided_by,
            "version": importlib.metadata.version("pytest-lmeval"),
        }

    @property
    def key(self) -> str:
        return key_of(**self.identity)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the record."""
        identity = {name: value for name, value in self.identity.items() if name not in ("protocol", "lm", "version")}
        keys = {"key": self.key, "trained_from_fingerprint": fingerprint(self.lm)}
        return {**self.names, **keys, **identity, **self.protocol.to_json()}


@dataclass(frozen=True, kw_only=True)
class TextPlan(Plan):
    """A training on a text, of which `held_out` decides which weights are best."""

    text: Corpus
    held_out: Corpus | None


def plan_for(lm: Model, corpus: Source, held_out: Source | None, protocol: Protocol, spec: str | None = None) -> TextPlan:
    """The plan. Raises SpecError for a model that this protocol cannot train, CorpusError if both texts are the same."""
    refuse_untrainable(lm, protocol)
    text = readable_again(lm, corpus, protocol.tokens)
    unseen = None if held_out is None else readable_again(lm, held_out, protocol.tokens)
    if unseen is not None and unseen.fingerprint == text.fingerprint:
        same = f"{text}, to train on, and {unseen}, to hold out, are the same text"
        raise CorpusError(f"{same}: a model that learned it by heart would look best. Hold out another split.")
    tokenizer = None if text.tokenized else getattr(lm.tokenizer, "name", type(lm.tokenizer).__name__)
    names = {
        "trained_from": lm.spec,
        "corpus": str(text),
        "held_out": None if unseen is None else str(unseen),
        "tokenized_by": tokenizer,
    }
    decided_by = {
        "data": text.identity,
        "held_out_data": None if unseen is None else unseen.identity,
        "tokenizer": tokenizer_fingerprint(lm),
    }
    return TextPlan(lm, str(text), protocol, decided_by, names, spec, text=text, held_out=unseen)


def refuse_untrainable(lm: Model, protocol: Protocol, *, frozen: bool = False) -> None:
    """Raise SpecError for a model that this protocol cannot train; `frozen`: its own parameters are not to be trained."""
    if lm.module is None or lm.rebuild is None:
        raise SpecError(f"{lm.spec} is no torch module: it has no weights that could be trained.")
    if lm.codebooks is not None:
        raise SpecError(f"{lm.spec} reads frames of {len(lm.codebooks.sizes)} codes, which no protocol supports yet.")
    trained = {name: tensor.dtype for name, tensor in lm.module.named_parameters() if tensor.requires_grad and not frozen}
    if not trained and not frozen:
        raise SpecError(f"{lm.spec} has no parameter with requires_grad=True: there is nothing to train.")
    if coarse := [name for name, dtype in trained.items() if dtype in COARSE]:
        raise SpecError(
            f"{lm.spec} has {len(coarse)} parameters in {trained[coarse[0]]}, for example {coarse[0]}. Most updates are "
            "smaller than their rounding, and would be lost. Load it with @fp32, train, and convert the trained model."
        )
    if lm.limit is not None and protocol.seq_len > lm.limit:
        limit = f"seq_len={protocol.seq_len:,} is more than {lm.spec} reads: at most {lm.limit:,} tokens"
        raise ProtocolError(f"{limit}. Take a smaller seq_len, for all models that are to be compared.")


def readable_again(lm: Model, source: Source, limit: int) -> Corpus:
    """A corpus with a fingerprint. Reads sources without one, such as iterators, now."""
    corpus = as_corpus(source)
    if corpus.fingerprint:
        return corpus
    return replace(as_corpus(read(lm, corpus, limit)), name=corpus.name, split=corpus.split)


def read(lm: Model, corpus: Corpus, limit: int) -> np.ndarray:
    """The first `limit` tokens of a corpus, [n] int32, its documents joined; reads no further.

    Raises StreamError for a token outside the vocabulary, CorpusError for a text that cannot be read.
    """
    parts, start = [np.empty(0, dtype=np.int32)], 0
    for part in TokenReader(model_for(lm, corpus), corpus.documents(), limit=limit):
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
        cut = f" (the protocol reads at most tokens={protocol.tokens:,})" if len(tokens) == protocol.tokens else ""
        batch = f"one batch of {protocol.batch_size} crops of {protocol.seq_len} tokens"
        raise CorpusError(
            f"{name} gave {len(tokens):,} tokens{cut}, but {batch} needs {protocol.batch_size * protocol.seq_len + 1:,}. "
            "Give more text, or take a smaller batch_size or seq_len."
        )
    return steps


def batches(tokens: np.ndarray, protocol: Protocol, *, first: int = 0) -> Iterator[Tensor]:
    """The batches of all updates from `first` on, without end: [batch_size, seq_len + 1] int64.

    Each epoch reads each crop once, in an order drawn from (seed, epoch), and leaves out those that fill no batch. The last
    target of a crop is the first input of the next. The beginning of the first crop is drawn, too, within the spare tokens.
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
        short = f"the held-out text {name} gave {len(tokens):,} tokens; one crop needs {protocol.seq_len + 1:,}"
        raise CorpusError(f"{short}. Give more text, or take a smaller seq_len.")
    wanted = min(crops, max(1, protocol.eval_tokens // protocol.seq_len))
    starts = np.linspace(0, crops - 1, wanted).round().astype(int) * protocol.seq_len
    chosen = tokens[starts[:, None] + np.arange(protocol.seq_len + 1)]
    return list(torch.from_numpy(chosen.astype(np.int64)).split(protocol.batch_size))  # type: ignore[no-untyped-call]
