"""Perplexity of a corpus, and everything else that one reading of it tells.

    perplexity     exp(nats / tokens)                  depends on the tokenizer
    bits_per_byte  nats / ln 2 / bytes                 comparable between tokenizers; bytes of the original text
    token_accuracy share of targets among the model's first k choices

The reading carries the state through the whole text where the model allows it; where it has no state, or a
limited context, the text is read in overlapping windows, and the record says so (`engine._policy`). Of a model with fast
weights it also says how far they moved (`scoring._fast_weights`), and of chosen places what the loss is there
(`scoring._positions`).

With window="lm_eval" each document is read as lm-evaluation-harness reads it (`loglikelihood_rolling`), so that its numbers can
be had again: its bits_per_byte is this one, and its byte_perplexity is 2 ** bits_per_byte. Of its task wikitext only the losses
can be compared: there it reads a detokenized page, and counts the bytes of the original one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._ids import as_corpus
from pytest_lmeval.data._tokens import TokenReader, sequences
from pytest_lmeval.engine import Chunk, Engine, Policy, policy_for
from pytest_lmeval.engine._policy import Window
from pytest_lmeval.errors import StreamError
from pytest_lmeval.measures._context import VerbContext, current, verb
from pytest_lmeval.models._identity import facts, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._journal import Checkpoints, Saver
from pytest_lmeval.records._measured import Cost, Record, Result, Series
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring import _fast_weights as fast_weights
from pytest_lmeval.scoring._loss_accumulator import BYTES, HITS, NATS, TOKENS, LossAccumulator
from pytest_lmeval.scoring._losses import LossFile
from pytest_lmeval.scoring._positions import name_of, not_reached
from pytest_lmeval.scoring._reading_figures import above_floor, metrics_of, series_of
from pytest_lmeval.scoring._resume import read_point, write_point
from pytest_lmeval.scoring._units import write_units

Progress = Callable[[int, float, int | None], None]
"""Called after each chunk with the tokens scored, the nats so far, and the tokens expected (None: unknown)."""


@verb
def perplexity(
    lm: Any,
    corpus: Corpus | Iterable[Any],
    chunk_size: int | None = None,
    tokens: int | None = None,
    *,
    limit: int | None = None,
    as_stream: bool | None = None,
    window: Window = None,
    overlap: int | None = None,
    positions: tuple[int, ...] = (),
    losses: bool | str | Path = False,
) -> PerplexityResult:
    """Read a corpus: perplexity, bits per byte, accuracy, loss by position (see `measure_perplexity` for the parameters).

    The model's laws are probed first. Its state is carried only in a way that was found exact; the record says which.
    window="lm_eval" reads each document in the windows of lm-evaluation-harness, so that its numbers can be had again.
    losses=True writes the loss of every token to a file in the output folder; a path names the file.
    """
    context = current()
    corpus = context.corpus(corpus)
    model, certificate = context.certified(lm)
    policy = policy_for(model, certificate, chunk_size=chunk_size, window=window, overlap=overlap)
    settings: dict[str, Any] = {
        "tokens": tokens or context.session.tokens,
        "limit": context.session.limit if limit is None else limit,
        "as_stream": as_stream,
        "positions": positions,
    }
    data = [corpus.name, corpus.split, corpus.fingerprint, tokenizer_fingerprint(model), policy.reading, str(losses)]
    key = context.key("perplexity", model, settings, data)
    known = bool(corpus.fingerprint)  # an iterator may bring something else the next time
    if known and (finished := context.finished(key)) is not None:
        return PerplexityResult(finished)
    journal, units = context.session.journal, context.file("units.jsonl")
    examples = context.file("losses.npy") if losses is True else None
    with context.session.progress(f"{model.spec} reads {corpus}") as progress:
        result = measure_perplexity(
            model,
            corpus,
            policy=policy,
            **settings,
            losses=_losses_file(context, examples, losses),
            units=context.path(units),
            progress=progress,
            checkpoints=journal.checkpoints if journal and known and policy.resume else None,
            key=key,
        )
    if result.resumed_at:
        context.log.notes.append(f"{model.spec} on {corpus}: went on from token {result.resumed_at:,} of an interrupted run")
    context.log.notes += result.record.details.get("warnings", [])
    files = {"examples": examples or result.record.examples, "units": units}
    return context.recorded(key, replace(result, record=structs.replace(result.record, **files)))


def _losses_file(context: VerbContext, named: str | None, losses: bool | str | Path) -> str | Path | None:
    """Where the loss of every token is written. Raises StreamError where that is nowhere."""
    if losses is True and named is None:
        raise StreamError(
            "losses=True writes into the output folder of a run, and outside of tests there is none. Name a file: losses=PATH."
        )
    return context.path(named) if losses is True else losses or None


@dataclass(frozen=True, repr=False)
class PerplexityResult(Result):
    """What a reading found. Numbers carry `.low` and `.high`, their 95 % interval (bootstrap over documents, or over
    blocks of one stream; None where the text is too short for one)."""

    resumed_at: int = 0  # tokens that an interrupted run had already scored

    @property
    def perplexity(self) -> Value:
        """exp of the mean loss a token."""
        return self.record.metrics["perplexity"]

    @property
    def nll(self) -> Value:
        """Mean negative log-likelihood, nats a token."""
        return self.record.metrics["nll"]

    @property
    def bits_per_byte(self) -> Value:
        """Bits a byte of the original text; only for corpora of text."""
        if "bits_per_byte" not in self.record.metrics:
            raise AttributeError(f"{self.record.subject} holds token ids, no text: there are no bytes to divide by.")
        return self.record.metrics["bits_per_byte"]

    @property
    def token_accuracy(self) -> dict[int, Value]:
        """Share of targets among the model's first k choices, by k."""
        return {k: self.record.metrics[f"token_accuracy_top{k}"] for k in HITS}

    @property
    def tokens(self) -> int:
        """Target tokens scored, each exactly once."""
        return self.record.cost.tokens or 0

    @property
    def tokens_per_second(self) -> Value:
        return self.record.metrics["tokens_per_second"]

    @property
    def seconds(self) -> float:
        return self.record.cost.seconds or 0.0

    @property
    def state_bytes(self) -> int:
        """The most memory that the carried state took."""
        return self.record.cost.state_bytes or 0

    @property
    def chunks(self) -> int:
        return int(self.record.details["chunks"])

    @property
    def chunk_loss(self) -> Series:
        """Mean loss of each chunk (of groups of chunks, in a very long reading), nats a token, by tokens read."""
        return self.record.series["chunk_loss"]

    @property
    def chunk_seconds(self) -> Series:
        return self.record.series["chunk_seconds"]

    @property
    def loss_by_position(self) -> Series:
        """Mean loss by the number of tokens before the target, in half octaves."""
        return self.record.series["loss_by_position"]

    @property
    def loss_at(self) -> dict[int, Value]:
        """Mean loss of the thousand tokens up to each chosen position that was reached, with its interval, nats a token."""
        series = self.record.series.get("loss_at")
        return {} if series is None else {int(at): self.record.metrics[name_of(int(at))] for at in series.x}

    @property
    def loss_slope(self) -> Value:
        """Least-squares slope of `loss_at`, nats a token per 1000 positions: negative where context goes on helping.

        Raises AttributeError where fewer than two of the chosen positions were reached.
        """
        if "loss_slope" not in self.record.metrics:
            asked, missing = self.record.settings.get("positions", []), self.record.details.get("not_reached", [])
            raise AttributeError(
                f"a slope takes two positions at least. Asked for were {asked or 'none'}; of those, {self.record.subject} did "
                f"not go on to {missing or 'none'}. Give positions that the text reaches: positions=(1000, 2000, 4000)."
            )
        return self.record.metrics["loss_slope"]

    @property
    def fast_weights(self) -> fast_weights.FastWeights | None:
        """What became of the model's fast weights while it read; None if it has none."""
        return fast_weights.found_in(self.record)

    @property
    def certificate(self) -> Certificate | None:
        """The verdict that the reading stands on."""
        return self.record.certificate


def measure_perplexity(
    lm: Model,
    corpus: Corpus | Iterable[Any],
    *,
    policy: Policy | None = None,
    tokens: int | None = None,
    limit: int | None = None,
    as_stream: bool | None = None,
    positions: tuple[int, ...] = (),
    losses: str | Path | None = None,
    units: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    key: str = "",
) -> PerplexityResult:
    """Read a corpus and score every token of it once.

    corpus      a `Corpus`, or token ids (tensor, array, list, iterator of arrays)
    policy      how it is read (see `engine.policy_for`); by default as the model declares that it can be
    tokens      read so many tokens of the stream (of each document, when read by document)
    limit       read so many documents
    as_stream   one endless stream, or document by document with a new state each; by default as the corpus is meant, and
                by document in the windows of lm_eval
    positions   places at which the loss is wanted, for example (8000, 16000, 24000): means of the thousand tokens up to each
    losses      write the loss of every target to this .npy file (float32, nats), as it is read
    units       write the sums of each document, or block of the stream, to this file of JSON lines (see `scoring._units`)
    checkpoints, key    save a point to go on from now and then, and start from the last one

    How far the model's fast weights move is looked at after every chunk, if it has any (`Model.fast_weights`); where some stay
    as they were, `details["warnings"]` of the record says so.

    Raises StreamError, NotFiniteError and CorpusError; see there.
    """
    source, engine = as_corpus(corpus), Engine(lm, policy)
    if wrong := [place for place in positions if not isinstance(place, int) or place < 1]:
        raise StreamError(f"positions holds {wrong}; a position is the number of tokens before a target, 1 or more.")
    rolling = engine.policy.windows is not None and engine.policy.windows.anchored
    by_document = not ((source.as_stream and not rolling) if as_stream is None else as_stream)
    texts = sequences(lm, source, by_document=by_document, limit=limit, tokens=tokens, rolling=rolling)
    reading = read_point(checkpoints, key, lm)
    if reading is None or not LossFile.holds(losses, reading.tokens):
        reading = LossAccumulator(by_document, tuple(sorted(set(positions))))
    resumed_at, watch = reading.tokens, fast_weights.watch(lm, reading)

    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    began = time.perf_counter() - reading.seconds
    with LossFile(losses, already=resumed_at) as file:

        def save(reading: LossAccumulator) -> None:
            assert checkpoints is not None
            file.sync()
            reading.seconds = time.perf_counter() - began
            write_point(checkpoints, key, reading)

        saver = Saver(save if checkpoints else None, "reading")
        for chunk in read(engine, texts, reading, str(source)):
            file.write(chunk.losses)
            if progress is not None:
                expected = expected_tokens(lm, source, reading.total, tokens, by_document)
                progress(reading.tokens, float(reading.total[NATS]), expected)
            if watch is None or watch.look(reading):  # don't checkpoint while a measurement is pending
                saver.save_now_and_then(reading)
        if watch is not None:
            watch.look(reading, last=True)
    if not reading.tokens:
        raise StreamError(f"{source} holds no document, or no code that could be predicted: there is nothing to score.")
    chosen = {"tokens": tokens, "limit": limit}
    record = record_of(engine, source, reading, chosen, seconds=time.perf_counter() - began, seed=seed)
    record = structs.replace(
        record,
        examples=None if losses is None else str(losses),
        units=None if units is None else str(units),
    )
    if units is not None:
        write_units(units, reading)
    return PerplexityResult(record, resumed_at)


def read(engine: Engine, texts: Iterable[TokenReader], reading: LossAccumulator, name: str) -> Iterator[Chunk]:
    """Read the texts from where the reading stands: each chunk, added to its sums."""
    begun = bool(reading.scored)
    for index, ids in enumerate(texts):
        if index < len(reading.documents):
            continue
        if not begun:
            reading.start_document()
        ids.skip = reading.scored if engine.policy.windows is None else reading.window
        with named(name, index if reading.by_document else None):
            for chunk in engine.stream(ids, state=reading.state, position=reading.scored, window=reading.window):
                reading.add(chunk)
                yield chunk
        reading.documents.append(ids.content.hexdigest()[:16])
        begun = False


@contextmanager
def named(corpus: str, document: int | None) -> Iterator[None]:
    """Say of which text an error is."""
    try:
        yield
    except StreamError as error:
        raise StreamError(f"{corpus}" + ("" if document is None else f", document {document}") + f": {error}") from error


def record_of(
    engine: Engine, corpus: Corpus, reading: LossAccumulator, chosen: dict[str, int | None], *, seconds: float, seed: int
) -> Record:
    """Everything that a reading found, and how it was had."""
    lm, policy = engine.lm, engine.policy
    windows, certificate = policy.windows, policy.certificate
    metrics = above_floor(metrics_of(reading, seconds=seconds, seed=seed), corpus.entropy)
    return Record(
        kind="perplexity",
        subject=str(corpus),
        lm=facts(lm),
        settings={
            "chunk_size": engine.chunk_size,
            "reading": "carried" if windows is None else "windows",
            "window": None if windows is None else windows.size,
            "overlap": 0 if windows is None else windows.overlap,
            **({"rolling": True} if windows is not None and windows.anchored else {}),
            "by_document": reading.by_document,
            **chosen,
            "tokenizer": None if corpus.tokenized else getattr(lm.tokenizer, "name", type(lm.tokenizer).__name__),
            "unit": "document" if reading.by_document else f"block of {reading.block} tokens",
            "data": corpus.fingerprint,
            "seed": seed,
            **({"positions": list(reading.positions)} if reading.positions else {}),
        },
        details={
            "why": "the state is carried" if windows is None else windows.why,
            "chunks": reading.chunks_seen,
            "documents": len(reading.units) if reading.by_document else None,
            **({"not_reached": not_reached(reading)} if reading.positions else {}),
            **(fast_weights.details_of(reading.moves, lm, reading.tokens) if reading.moves else {}),
        },
        notes=[] if windows is None else [str(windows)],
        example="document" if reading.by_document else "block",
        metrics=metrics,
        cost=Cost(
            seconds=seconds,
            tokens=reading.tokens,
            peak_bytes=torch.cuda.max_memory_allocated(lm.device) if lm.device.type == "cuda" else None,
            state_bytes=reading.peak_state_bytes,
        ),
        series=series_of(reading, metrics, carried=windows is None),
        certificate=None if certificate is None else structs.replace(certificate, chunking_used=policy.reading),
    )


def expected_tokens(lm: Model, corpus: Corpus, sums: np.ndarray, tokens: int | None, by_document: bool) -> int | None:
    """How many targets the whole reading will have: known for ids, estimated from the bytes read so far for text, and of frames
    at most so many, since codes may be missing."""

    def targets(length: int) -> int:
        return length - 1 if lm.codebooks is None else length * len(lm.codebooks.scored)

    known = targets(tokens) if tokens and not by_document else None
    if corpus.size is None or (by_document and tokens):
        return known
    whole = targets(corpus.size) if corpus.tokenized else round(corpus.size * sums[TOKENS] / max(sums[BYTES], 1))
    return whole if known is None else min(known, whole)
