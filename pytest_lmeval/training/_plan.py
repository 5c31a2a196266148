"""A training before it begins: which model, which texts, which protocol, and whether they go together."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.errors import CorpusError, ProtocolError, SpecError
from pytest_lmeval.models._identity import fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._journal import key_of
from pytest_lmeval.training._batches import readable_again
from pytest_lmeval.training._protocol import Protocol

COARSE = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """spec   how the trained model is to be called; None: after what is done"""

    lm: Model
    text: Corpus
    held_out: Corpus | None
    protocol: Protocol
    spec: str | None = None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the outcome."""
        return {
            "protocol": self.protocol.to_json(),
            "lm": [fingerprint(self.lm), str(self.lm.dtype), str(self.lm.device)],
            "frozen": [] if self.lm.module is None else _frozen(self.lm.module),
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
        """What the identity is about, for people."""
        tokenizer = None if self.text.tokenized else getattr(self.lm.tokenizer, "name", type(self.lm.tokenizer).__name__)
        held_out = None if self.held_out is None else str(self.held_out)
        return {"trained_from": self.lm.spec, "corpus": str(self.text), "held_out": held_out, "tokenized_by": tokenizer}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was chosen, for the record."""
        identity = {name: value for name, value in self.identity.items() if name not in ("protocol", "lm", "version")}
        return {
            **self.names,
            "key": self.key,
            "trained_from_fingerprint": fingerprint(self.lm),
            **identity,
            **self.protocol.to_json(),
        }


def _frozen(module: nn.Module) -> list[str]:
    """Names of the parameters that are not trained."""
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


def plan_for(
    lm: Model,
    corpus: Corpus | Iterable[Any],
    held_out: Corpus | Iterable[Any] | None,
    protocol: Protocol,
    spec: str | None = None,
) -> Plan:
    """Raises SpecError for a model that this protocol cannot train, CorpusError for a text that is held out from itself."""
    refuse_untrainable(lm, protocol)
    text = readable_again(lm, corpus, protocol.tokens)
    unseen = None if held_out is None else readable_again(lm, held_out, protocol.tokens)
    if unseen is not None and unseen.fingerprint == text.fingerprint:
        raise CorpusError(
            f"{text} is trained on and {unseen} is held out, and they are the same text: a model that knows it by heart would "
            "look best. Hold out another split."
        )
    return Plan(lm, text, unseen, protocol, spec)


def refuse_untrainable(lm: Model, protocol: Protocol) -> None:
    """Raise SpecError for a model that this protocol cannot train."""
    if lm.module is None or lm.rebuild is None:
        raise SpecError(f"{lm.spec} is no torch module: it has no weights that could be trained.")
    if lm.codebooks is not None:
        raise SpecError(f"{lm.spec} reads frames of {len(lm.codebooks.sizes)} codes, and there is no protocol for those yet.")
    trained = {name: tensor.dtype for name, tensor in lm.module.named_parameters() if tensor.requires_grad}
    if not trained:
        raise SpecError(f"{lm.spec} has no parameter with requires_grad=True: there is nothing to train.")
    if coarse := [name for name, dtype in trained.items() if dtype in COARSE]:
        raise SpecError(
            f"{lm.spec} has {len(coarse)} parameters in {trained[coarse[0]]}, for example {coarse[0]}. Most updates of a "
            "training are smaller than one rounding of such weights, and would be lost. Load it with @fp32, train, and convert "
            "the trained model."
        )
    if lm.limit is not None and protocol.seq_len > lm.limit:
        raise ProtocolError(
            f"seq_len={protocol.seq_len:,} is more than {lm.spec} reads: at most {lm.limit:,} tokens. "
            "Take a smaller seq_len, for all models that are to be compared."
        )
