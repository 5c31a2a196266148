"""Training, by the one protocol for all models."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_lmeval.data.corpus import Corpus
from pytest_lmeval.errors import CorpusError, Refused
from pytest_lmeval.measures.context import Desk

if TYPE_CHECKING:
    from pytest_lmeval.training import TrainResult


def train(desk: Desk, /, lm: Any, corpus: Corpus, *, held_out: Corpus | None = None, **protocol: Any) -> TrainResult:
    """Train a copy of the model by the one protocol for all models (see `training.train`); `.lm` of the result is it.

    lm        a spec, or a model, which stays as it is
    held_out  the text that decides which weights are best; the validation split of the same corpus by default
    protocol  fields of `training.Protocol`: steps, batch_size, seq_len, lr, seed, ...

    A model that was trained by the same protocol before is taken from the output folder.
    """
    from pytest_lmeval.measures._perplexity import bare_ids
    from pytest_lmeval.training import Protocol, train

    model = desk.model(lm)
    certificate = desk.session.verdict(model).certificate
    if "causality" in certificate.broken:
        raise Refused(
            f"{model.spec} is {certificate.verdict}:\n{certificate.why_not()}\nTrained, it would learn to look at the "
            "token that it is to predict, and its perplexity would look good and mean nothing."
        )
    corpus = corpus if isinstance(corpus, Corpus) else bare_ids(corpus)
    defaults: dict[str, Any] = {"seq_len": desk.seq_len(None, Protocol.seq_len)}
    if desk.session.tokens:
        defaults["tokens"] = desk.session.tokens
    chosen = Protocol.of(**{**defaults, **protocol})
    held_out = _validation(desk, corpus) if held_out is None else held_out
    with desk.session.progress(f"{model.spec} learns {corpus}") as progress:
        result = train(
            model,
            corpus,
            held_out=held_out,
            protocol=chosen,
            folder=desk.session.folder,
            progress=progress,
            spec=f"{model.spec} trained",
            fresh=desk.session.fresh,
        )
    if result.cached:
        desk.log.notes.append(f"{model.spec} on {corpus}: trained before by the same protocol")
    elif result.resumed_at:
        desk.log.notes.append(f"{model.spec} on {corpus}: went on from step {result.resumed_at:,} of an interrupted run")
    record = replace(result.record, certificate={**certificate.to_json(), "chunking_used": "crops, each from an empty state"})
    data = [corpus.fingerprint, getattr(held_out, "fingerprint", "")]
    return desk.recorded(desk.key("train", model, chosen.to_json(), data), replace(result, record=record))


def _validation(desk: Desk, corpus: Corpus) -> Corpus:
    """The text to hold out where none was given."""
    try:
        found = desk.session.corpus(corpus.name, "validation")
    except CorpusError as error:
        raise CorpusError(f"{corpus} has no validation split to hold out ({error}) Give another text: held_out=...") from None
    if found.fingerprint == corpus.fingerprint:
        raise CorpusError(f"{corpus.name} has one text for all splits. Give another one to hold out: held_out=corpus(...).")
    return found
