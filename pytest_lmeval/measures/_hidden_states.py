"""Measure means, covariances and principal directions of hidden states in one pass, of one set of texts or of two."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from msgspec import structs

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.data._tokens import as_corpus
from pytest_lmeval.engine import Engine, Policy, policy_for
from pytest_lmeval.engine._tokens import ids_of
from pytest_lmeval.errors import ArgumentError, StreamError, UnreadableError, some
from pytest_lmeval.measures._context import VerbContext, current, verb
from pytest_lmeval.measures._hidden_reading import HiddenBatch, HiddenReader, Token
from pytest_lmeval.measures._hidden_record import record_of
from pytest_lmeval.models._identity import facts, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._named import Layers, modules_of
from pytest_lmeval.records._journal import Checkpoints, Saver, warn
from pytest_lmeval.records._measured import MetricValue, Result
from pytest_lmeval.scoring._hidden_files import (
    Point,
    load_hidden_states,
    read_checkpoint,
    save_hidden_states,
    write_checkpoint,
)
from pytest_lmeval.scoring._hidden_states import HiddenStates

Texts: TypeAlias = "Corpus | str | Iterable[Any]"
Rank: TypeAlias = 'int | Literal["exact"] | None'

EXACT_WIDTH, RANK = 2048, 128  # width up to which covariances are exact by default, and the rank of those of wider layers


@verb
def hidden_states(
    lm: Any,
    texts: Texts | HiddenStates,
    other: Texts | None = None,
    *,
    layers: Layers = None,
    token: Token = "last",
    rank: Rank = None,
    limit: int | None = None,
    tokens: int | None = None,
    names: Sequence[str] = ("texts", "other texts"),
    save: str | Path | None = None,
) -> HiddenStatesResult:
    """Measure mean, covariance and principal directions of hidden states in one pass, by layer: of `texts`, or of the contrast
    of `texts` and `other` (see `measure_hidden_states` for the parameters).

    texts, other  strings, sequences of token ids, an iterator of these, or a corpus; each text is read from an empty state.
                  `HiddenStates` that were merged are recorded without reading anything
    save          write the sums to this file, which `load_hidden_states` reads

    The model's laws are probed first: texts are read side by side, and long ones in pieces, where that is exact.
    """
    context = current()
    model, certificate = context.certified(lm)
    if isinstance(texts, HiddenStates):
        return _merged(context, model, policy_for(model, certificate), texts, names)
    sources = [_corpus(context, own, name) for own, name in zip((texts, other), names, strict=True) if own is not None]
    settings: dict[str, Any] = {
        "layers": layers,
        "token": token,
        "rank": rank,
        "limit": context.session.limit if limit is None else limit,
        "tokens": tokens or context.session.tokens,
        "names": list(names),
    }
    policy = policy_for(model, certificate, window="unlimited" if model.stateful else None)
    data = [[source.name, source.identity] for source in sources]
    key = context.key("hidden_states", model, settings, [*data, tokenizer_fingerprint(model), policy.reading])
    known = all(source.fingerprint for source in sources)
    file = context.file("hidden.safetensors")
    if known and file and (done := _finished(context, key)) is not None:
        return done
    journal = context.session.journal
    with context.session.progress(f"{model.spec} reads {some(list(map(str, sources)))}", unit="texts") as progress:
        result = measure_hidden_states(
            model,
            *sources,
            policy=policy,
            **settings,
            save=save,
            progress=progress,
            checkpoints=journal.checkpoints if journal and known and policy.resume else None,
            key=key,
        )
    result = _with_file(result, file, context.path(file))
    if result.resumed_at:
        context.log.notes.append(
            f"{model.spec} on {result.record.subject}: resumed at text {result.resumed_at:,} of an interrupted run"
        )
    return context.recorded(key, result)


def _with_file(result: HiddenStatesResult, file: str | None, path: Path | None) -> HiddenStatesResult:
    """The result, whose record names the file of its sums; without one, and with a warning, if it cannot be written."""
    if path is None:
        return result
    try:
        save_hidden_states(result.states, path)
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror or error}): the sums of hidden states are not kept.")
        return result
    return replace(result, record=structs.replace(result.record, units=file))


def _merged(context: VerbContext, lm: Model, policy: Policy, states: HiddenStates, names: Sequence[str]) -> HiddenStatesResult:
    """The recorded result of sums that were read before. Raises ArgumentError for those of another model."""
    if states.about["model"] != (own := facts(lm).fingerprint):
        raise ArgumentError(
            f"these hidden states are of a model with the fingerprint {states.about['model']}, and {lm.spec} has {own}: they "
            "would pass for those of another model. Give the model that they were read from."
        )
    result = HiddenStatesResult(record_of(lm, states, names, policy), states)
    return context.recorded(context.key("hidden_states", lm, states.about, names), result)


def _finished(context: VerbContext, key: str) -> HiddenStatesResult | None:
    """The result that an interrupted run finished, if its sums can be read."""
    record = context.journaled(key)
    if record is None or record.units is None or (path := context.path(record.units)) is None:
        return None
    try:
        states = load_hidden_states(path)
    except UnreadableError:
        return None
    context.finished(key)
    return HiddenStatesResult(record, states)


@verb
def iter_hidden_states(
    lm: Any,
    texts: Texts,
    *,
    layers: Layers = None,
    token: Token = "last",
    limit: int | None = None,
    tokens: int | None = None,
) -> Iterator[HiddenBatch]:
    """Yield hidden states batch by batch, in the memory of one: `for batch in iter_hidden_states(lm, texts)`. The parameters
    are those of `hidden_states`. The order of texts is that of their lengths; `batch.texts` holds their numbers."""
    context = current()
    model, certificate = context.certified(lm)
    policy = policy_for(model, certificate, window="unlimited" if model.stateful else None)
    return hidden_batches(
        model, _corpus(context, texts, "texts"), policy, layers=layers, token=token, limit=limit, tokens=tokens
    )


def hidden_batches(
    lm: Model,
    texts: Texts,
    policy: Policy | None = None,
    *,
    layers: Layers = None,
    token: Token = "last",
    limit: int | None = None,
    tokens: int | None = None,
) -> Iterator[HiddenBatch]:
    """The batches of `iter_hidden_states`, read as the policy says."""
    _check(token, None)
    reader = HiddenReader(Engine(lm, policy), modules_of(lm, layers), token, limit, tokens)
    return (batch for batch, _ in reader.batches(_corpus(None, texts, "texts"), Point()) if batch is not None)


@dataclass(frozen=True, repr=False)
class HiddenStatesResult(Result):
    """The result of `hidden_states`.

    states  name, or number, of a layer -> its `LayerStates`: moments, directions, and of two sets the direction between them
    """

    states: HiddenStates
    resumed_at: int = 0  # texts that an interrupted run had already read

    separation = MetricValue(absent="{record.subject}: " + "a separation needs two sets, each of four texts at least.")
    """Standard deviations between the means of two sets, mean over the layers."""
    first_direction = MetricValue()
    """Fraction of the variance along the first direction, mean over the layers."""


def measure_hidden_states(
    lm: Model,
    texts: Texts,
    other: Texts | None = None,
    *,
    policy: Policy | None = None,
    layers: Layers = None,
    token: Token = "last",
    rank: Rank = None,
    limit: int | None = None,
    tokens: int | None = None,
    names: Sequence[str] = ("texts", "other texts"),
    save: str | Path | None = None,
    progress: Any = None,
    checkpoints: Checkpoints | None = None,
    key: str = "",
) -> HiddenStatesResult:
    """Read one set of texts, or two, and add up the hidden states of some layers.

    layers  names of modules, patterns ("model.layers.*"), or numbers of blocks (-1: the last); by default all blocks
    token   "last": the vector of the last token of each text; "mean": the mean over its tokens; "all": one for each token
    rank    keep each covariance in at most twice so many rows, with a bound of the error (see `statistics._moments`), or
            "exact"; by default exact up to a width of 2,048, and of rank 128 above
    limit   read so many texts of each set
    tokens  read so many tokens of each text
    names   of the sets, in plots

    Raises ArgumentError for a layer that there is not, with the nearest names, StreamError for a set of fewer than two vectors
    and for a text longer than the model reads, NotFiniteError for a hidden state that is not finite, and OutOfMemory.
    """
    _check(token, rank)
    began = time.perf_counter()
    engine = Engine(lm, policy)
    reader = HiddenReader(engine, modules_of(lm, layers), token, limit, tokens)
    sources = [_corpus(None, own, name) for own, name in zip((texts, other), names, strict=True) if own is not None]
    about = {"model": facts(lm).fingerprint, "layers": [*reader.widths], "token": token, "rank": rank, "tokens": tokens}
    saved = read_checkpoint(checkpoints, key, lm)
    states, point = saved or (_empty(about, len(sources), reader, rank), Point())
    resumed_at, skipped = sum(states.texts), states.skipped
    saver = Saver(None if checkpoints is None else lambda point: write_checkpoint(checkpoints, key, states, point), "reading")
    for which, source in enumerate(sources[point.which :], start=point.which):
        begin = point if which == point.which else Point(which)
        for batch, reached in reader.batches(source, begin):
            if batch is not None:
                states.add(which, batch.texts, batch.positions, batch.vectors)
                del batch  # before the next step needs its memory
            states.tokens, states.skipped = states.tokens + reader.read, skipped + reader.skipped
            reader.read = 0
            if progress is not None and any(states.texts):
                progress(sum(states.texts), float("nan"), None)
            if reached is not None:
                saver.save_if_due(reached)
        if (count := sum(next(iter(half.values())).count for half in states.moments[which])) < 2:
            raise StreamError(
                f"{source} has {count} vector(s), and a covariance needs two: a single one varies in no direction. Give it "
                'more texts, or token="all", a vector for each token.'
            )
    if save is not None:
        save_hidden_states(states, save)
    seconds = time.perf_counter() - began
    return HiddenStatesResult(record_of(lm, states, names, engine.policy, sources, limit, seconds), states, resumed_at)


def _check(token: str, rank: Any) -> None:
    if token not in get_args(Token):
        raise ArgumentError(f'token={token!r} was asked for; it is "last", "mean" or "all".')
    if rank not in (None, "exact") and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ArgumentError(f'rank={rank!r} was asked for; it is a number of directions, 1 or more, or "exact".')


def _empty(about: dict[str, Any], sets: int, reader: HiddenReader, rank: Rank) -> HiddenStates:
    ranks = {
        name: None if rank == "exact" or (rank is None and width <= EXACT_WIDTH) else rank or RANK
        for name, (width, _) in reader.widths.items()
    }
    return HiddenStates.empty(about, sets, reader.widths, ranks)


def _corpus(context: VerbContext | None, texts: Texts, name: str) -> Corpus:
    """A set of texts as a corpus of as many documents."""
    if isinstance(texts, Corpus) or not isinstance(texts, Iterable):
        return as_corpus(texts)
    if isinstance(texts, str):
        return as_corpus(texts) if context is None else context.corpus(texts)
    known = isinstance(texts, Sequence | np.ndarray) or hasattr(texts, "ndim")
    given: Any = texts
    if known and len(given) and not any(isinstance(text, Iterable) and getattr(text, "ndim", 1) for text in given):
        return as_corpus(given)  # the ids of one text
    numbered = (_document(number, text) for number, text in enumerate(texts))
    if not known:
        return Corpus(name, "...", lambda: numbered)
    documents = [*numbered]
    digest = hashlib.sha256()
    for document in documents:
        content = document.text if document.ids is None else document.ids.tolist()
        digest.update(json.dumps(content).encode())
    return Corpus(name, str(len(documents)), lambda: iter(documents), digest.hexdigest(), as_stream=False)


def _document(number: int, text: Any) -> Document:
    name = f"text {number}"
    return Document(name, text) if isinstance(text, str) else Document(name, ids=ids_of(text, name))
