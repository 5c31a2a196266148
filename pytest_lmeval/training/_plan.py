"""Plan a training: check that model, texts and protocol go together, and identify everything that decides its outcome."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.errors import CorpusError, ProtocolError, SpecError
from pytest_lmeval.models._identity import fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._journal import key_of
from pytest_lmeval.training._batches import readable_again
from pytest_lmeval.training._protocol import Protocol

COARSE = (torch.bfloat16, torch.float16)
Source: TypeAlias = "Corpus | Iterable[Any]"


@dataclass(frozen=True)
class Plan:
    """spec   name of the trained model; None: one that says what was done"""

    lm: Model
    text: Corpus
    held_out: Corpus | None
    protocol: Protocol
    spec: str | None = None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the outcome."""
        parameters = () if self.lm.module is None else self.lm.module.named_parameters()
        return {
            "protocol": self.protocol.to_json(),
            "lm": [fingerprint(self.lm), str(self.lm.dtype), str(self.lm.device)],
            "frozen": [name for name, parameter in parameters if not parameter.requires_grad],
            "data": self.text.fingerprint,
            "held_out_data": None if self.held_out is None else self.held_out.fingerprint,
            "tokenizer": tokenizer_fingerprint(self.lm),
            "version": importlib.metadata.version("pytest-lmeval"),
        }

    @property
    def key(self) -> str:
        return key_of(**self.identity)

    @property
    def names(self) -> dict[str, Any]:
        """The identity in names that people know."""
        tokenizer = None if self.text.tokenized else getattr(self.lm.tokenizer, "name", type(self.lm.tokenizer).__name__)
        held_out = None if self.held_out is None else str(self.held_out)
        return {"trained_from": self.lm.spec, "corpus": str(self.text), "held_out": held_out, "tokenized_by": tokenizer}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the record."""
        identity = {name: value for name, value in self.identity.items() if name not in ("protocol", "lm", "version")}
        from_ = {"key": self.key, "trained_from_fingerprint": fingerprint(self.lm)}
        return {**self.names, **from_, **identity, **self.protocol.to_json()}


def plan_for(lm: Model, corpus: Source, held_out: Source | None, protocol: Protocol, spec: str | None = None) -> Plan:
    """Raises SpecError for a model that this protocol cannot train, CorpusError if both texts are the same."""
    refuse_untrainable(lm, protocol)
    text = readable_again(lm, corpus, protocol.tokens)
    unseen = None if held_out is None else readable_again(lm, held_out, protocol.tokens)
    if unseen is not None and unseen.fingerprint == text.fingerprint:
        raise CorpusError(
            f"{text}, to train on, and {unseen}, to hold out, are the same text: a model that learned it by heart would look "
            "best. Hold out another split."
        )
    return Plan(lm, text, unseen, protocol, spec)


def refuse_untrainable(lm: Model, protocol: Protocol) -> None:
    """Raise SpecError for a model that this protocol cannot train."""
    if lm.module is None or lm.rebuild is None:
        raise SpecError(f"{lm.spec} is no torch module: it has no weights that could be trained.")
    if lm.codebooks is not None:
        raise SpecError(f"{lm.spec} reads frames of {len(lm.codebooks.sizes)} codes, which no protocol supports yet.")
    trained = {name: tensor.dtype for name, tensor in lm.module.named_parameters() if tensor.requires_grad}
    if not trained:
        raise SpecError(f"{lm.spec} has no parameter with requires_grad=True: there is nothing to train.")
    if coarse := [name for name, dtype in trained.items() if dtype in COARSE]:
        raise SpecError(
            f"{lm.spec} has {len(coarse)} parameters in {trained[coarse[0]]}, for example {coarse[0]}. Most updates are "
            "smaller than their rounding, and would be lost. Load it with @fp32, train, and convert the trained model."
        )
    if lm.limit is not None and protocol.seq_len > lm.limit:
        raise ProtocolError(
            f"seq_len={protocol.seq_len:,} is more than {lm.spec} reads: at most {lm.limit:,} tokens. "
            "Take a smaller seq_len, for all models that are to be compared."
        )
