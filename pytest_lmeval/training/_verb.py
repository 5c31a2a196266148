"""The verb `train`: train a model by the one protocol for all models."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from msgspec import structs

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.engine._policy import refuse_training
from pytest_lmeval.errors import CorpusError, RegistryError
from pytest_lmeval.measures._context import VerbContext, current, shared_verb
from pytest_lmeval.training._loop import run_training
from pytest_lmeval.training._protocol import Protocol
from pytest_lmeval.training._result import TrainResult


@functools.partial(shared_verb, trains=True)
def train(lm: Any, corpus: Any, *, held_out: Any = None, spec: str | None = None, **protocol: Any) -> TrainResult:
    """Train a copy of the model by the one protocol for all models (see `training.run_training`); it is `.lm` of the result.

    lm        a spec, or a model, which does not change
    corpus    a name, a `Corpus`, or token ids
    held_out  the text that decides which weights are best; by default the validation split of the same corpus
    spec      name of the trained model
    protocol  fields of `training.Protocol`: steps, batch_size, seq_len, lr, seed, ...

    Takes a model that was trained by the same protocol before from the output folder.
    """
    context = current()
    model, session = context.model(lm), context.session
    certificate = session.verdict(model).certificate
    refuse_training(model, certificate)
    text = context.corpus(corpus)
    defaults: dict[str, Any] = {"seq_len": context.seq_len(None, Protocol.seq_len)}
    if session.tokens:
        defaults["tokens"] = session.tokens
    chosen = Protocol.of(**{**defaults, **protocol})
    unseen = _validation(context, text) if held_out is None else context.corpus(held_out)
    spec = spec or f"{model.spec} trained"
    with session.progress(f"{model.spec} learns {text}") as show:
        result = run_training(
            model,
            text,
            held_out=unseen,
            protocol=chosen,
            folder=session.folder,
            progress=show,
            spec=spec,
            fresh=session.fresh and session.writes,
        )
    if result.cached:
        context.log.notes.append(f"{model.spec} on {text}: trained before by the same protocol")
    elif result.resumed_at:
        context.log.notes.append(f"{model.spec} on {text}: resumed at step {result.resumed_at:,} of an interrupted run")
    context.log.notes += result.record.details.get("warnings", [])
    read = structs.replace(certificate, chunking_used="crops, each from an empty state")
    key = context.key("train", model, chosen.to_json(), [text.fingerprint, unseen.fingerprint])
    return context.recorded(key, replace(result, record=structs.replace(result.record, certificate=read)))


def _validation(context: VerbContext, corpus: Corpus) -> Corpus:
    try:
        found = context.session.corpus(corpus.name, "validation")
    except (CorpusError, RegistryError) as error:  # bare ids have a name that no corpus has
        raise CorpusError(f"{corpus} has no validation split to hold out ({error}) Give another text: held_out=...") from None
    if found.fingerprint == corpus.fingerprint:
        raise CorpusError(f"{corpus.name} has one text for all splits. Give another one to hold out: held_out=corpus(...).")
    return found
