"""Perplexity of a corpus, and everything else that one reading of it tells.

    perplexity     exp(nats / tokens)                  depends on the tokenizer
    bits_per_byte  nats / ln 2 / bytes                 comparable between tokenizers; bytes of the original text
    token_accuracy share of targets among the model's first k choices

The reading carries the state through the whole text where the model allows it; where it has no state, or a
limited context, the text is read in overlapping windows, and the record says so (`plan.py`). Of a model with fast weights it
also says how far they moved (`fast_weights.py`), and of chosen places what the loss is there (`positions.py`).

With window="lm_eval" each document is read as lm-evaluation-harness reads it (`loglikelihood_rolling`), so that its numbers can
be had again: its bits_per_byte is this one, and its byte_perplexity is 2 ** bits_per_byte. Of its task wikitext only the losses
can be compared: there it reads a detokenized page, and counts the bytes of the original one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pytest_lmeval.data.corpus import Corpus, Document
from pytest_lmeval.errors import StreamError
from pytest_lmeval.models.identity import facts
from pytest_lmeval.models.model import Model
from pytest_lmeval.records.journal import Checkpoints
from pytest_lmeval.records.record import Record, Series
from pytest_lmeval.records.value import Metric
from pytest_lmeval.scoring import fast_weights
from pytest_lmeval.scoring.losses import LossFile
from pytest_lmeval.scoring.plan import Point, Reader, plan_for
from pytest_lmeval.scoring.positions import loss_metrics, name_of, not_reached
from pytest_lmeval.scoring.reading import BYTES, HITS, NATS, SECONDS, STATE, TOKENS, Reading
from pytest_lmeval.scoring.result import PerplexityResult
from pytest_lmeval.scoring.resume import Saver
from pytest_lmeval.scoring.units import write_units
from pytest_lmeval.statistics.bootstrap import ratio_intervals

Progress = Callable[[int, float, int | None], None]
"""Called after each chunk with the tokens scored, the nats so far, and the tokens expected (None: unknown)."""


def measure_perplexity(
    lm: Model,
    corpus: Corpus | Iterable[Any],
    *,
    chunk_size: int | None = None,
    tokens: int | None = None,
    limit: int | None = None,
    as_stream: bool | None = None,
    window: int | Literal["unlimited", "lm_eval"] | None = None,
    overlap: int | None = None,
    positions: tuple[int, ...] = (),
    losses: str | Path | None = None,
    units: str | Path | None = None,
    certificate: dict[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    key: str = "",
) -> PerplexityResult:
    """Read a corpus and score every token of it once.

    corpus      a `Corpus`, or token ids (tensor, array, list, iterator of arrays)
    tokens      read so many tokens of the stream (of each document, when read by document)
    limit       read so many documents
    as_stream   one endless stream, or document by document with a new state each; by default as the corpus is meant, and
                with window="lm_eval" by document
    window, overlap, chunk_size    see `plan_for`
    positions   places at which the loss is wanted, for example (8000, 16000, 24000): means of the thousand tokens up to each
    losses      write the loss of every target to this .npy file (float32, nats), as it is read
    units       write the sums of each document, or block of the stream, to this file of JSON lines (see `units.py`)
    checkpoints, key    save a point to go on from now and then, and start from the last one

    How far the model's fast weights move is looked at after every chunk, if it has any (`Model.fast_weights`); where some stay
    as they were, settings["warnings"] says so.

    Raises StreamError, NotFiniteError and CorpusError; see there.
    """
    source = corpus if isinstance(corpus, Corpus) else bare_ids(corpus)
    if wrong := [place for place in positions if not isinstance(place, int) or place < 1]:
        raise StreamError(f"positions holds {wrong}; a position is the number of tokens before a target, 1 or more.")
    plan = plan_for(lm, chunk_size=chunk_size, window=window, overlap=overlap)
    by_document = not ((source.as_stream and not plan.rolling) if as_stream is None else as_stream)
    reader = Reader(lm, source, plan, tokens, limit, by_document)
    saver = Saver(checkpoints, key)
    point = saver.load(lm)
    if point is None or not LossFile.holds(losses, int(point.reading.total[TOKENS])):
        point = Point(Reading(by_document, tuple(sorted(set(positions)))))
    resumed_at = int(point.reading.total[TOKENS])
    watch = fast_weights.watch(lm, point)

    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    began = time.perf_counter() - point.seconds
    with LossFile(losses, already=resumed_at) as file:
        for point in reader.read(point):  # noqa: B020 - each point follows from the one before
            file.write(point.nll)
            if progress is not None:
                sums = point.reading.total
                progress(int(sums[TOKENS]), float(sums[NATS]), expected_tokens(lm, source, sums, tokens, by_document))
            if watch is None or watch.look(point):  # what is left to be measured could not be taken up from a saved point
                saver.save_now_and_then(replace(point, seconds=time.perf_counter() - began), file.sync)
        if watch is not None:
            watch.look(point, last=True)
    if not point.reading.total[TOKENS]:
        raise StreamError(f"{source} holds no document, or no code that could be predicted: there is nothing to score.")
    record = record_of(reader, point.reading, seconds=time.perf_counter() - began, seed=seed)
    record = replace(
        record,
        certificate=None if certificate is None else {**certificate, "chunking_used": str(plan)},
        examples=None if losses is None else str(losses),
        units=None if units is None else str(units),
    )
    if units is not None:
        write_units(units, point.reading)
    return PerplexityResult(record, resumed_at)


def record_of(reader: Reader, reading: Reading, *, seconds: float, seed: int) -> Record:
    """Everything that a reading found, and how it was had."""
    lm, plan, corpus = reader.lm, reader.plan, reader.corpus
    metrics = above_floor(metrics_of(reading, seconds=seconds, seed=seed), corpus.entropy)
    return Record(
        kind="perplexity",
        subject=str(corpus),
        lm=facts(lm),
        settings={
            "chunk_size": plan.chunk_size,
            "reading": "carried" if plan.window is None else "windows",
            "window": plan.window,
            "overlap": plan.overlap,
            "why": plan.why,
            **({"rolling": True} if plan.rolling else {}),
            "by_document": reading.by_document,
            "documents": len(reading.units) if reading.by_document else None,
            "tokens": reader.tokens,
            "limit": reader.limit,
            "chunks": reading.chunks_seen,
            "tokenizer": None if corpus.tokenized else getattr(lm.tokenizer, "name", type(lm.tokenizer).__name__),
            "unit": "document" if reading.by_document else f"block of {reading.block} tokens",
            "data": corpus.fingerprint,
            "seed": seed,
            **({"positions": list(reading.positions), "not_reached": not_reached(reading)} if reading.positions else {}),
            **(fast_weights.settings_of(reading.moves, lm, int(reading.total[TOKENS])) if reading.moves else {}),
        },
        metrics=metrics,
        cost={
            "seconds": seconds,
            "tokens": int(reading.total[TOKENS]),
            "peak_bytes": torch.cuda.max_memory_allocated(lm.device) if lm.device.type == "cuda" else None,
            "state_bytes": reading.peak_state_bytes,
        },
        series=series_of(reading, metrics, carried=plan.window is None),
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


def metrics_of(reading: Reading, *, seconds: float, seed: int) -> dict[str, Metric]:
    """The ratios that the sums of a reading stand for, with their intervals."""
    total, n = reading.total, int(reading.total[TOKENS])
    ratios = {"nll": (NATS, TOKENS), **{f"token_accuracy_top{k}": (column, TOKENS) for k, column in HITS.items()}}
    if total[BYTES]:
        ratios["bits_per_byte"] = (NATS, BYTES)
    intervals = ratio_intervals(np.array(reading.units), list(ratios.values()), seed=seed)
    metrics = {}
    for (name, (above, below)), interval in zip(ratios.items(), intervals, strict=True):
        unit, scale = {"nll": ("nats/token", 1.0), "bits_per_byte": ("bits/byte", 1 / math.log(2))}.get(name, ("", 1.0))
        low, high = (scale * bound for bound in interval) if interval else (None, None)
        value = scale * total[above] / total[below]
        metrics[name] = Metric(value, unit, low=low, high=high, n=n, higher_is_better=above != NATS)
    metrics["perplexity"] = exponential(metrics["nll"])
    metrics["tokens_per_second"] = Metric(n / seconds, "tokens/s", n=n, higher_is_better=True)
    moved = {} if reading.moves is None else fast_weights.metrics_of(reading.moves)
    return {**metrics, **loss_metrics(reading, seed=seed), **moved}


def above_floor(metrics: dict[str, Metric], entropy: float | None) -> dict[str, Metric]:
    """The metrics, and for a text of known entropy: what the best model pays on average, and how much more was paid."""
    if entropy is None or "bits_per_byte" not in metrics:
        return metrics
    paid, ln2 = metrics["bits_per_byte"], math.log(2)
    low, high = (None if bound is None else bound * ln2 - entropy for bound in (paid.low, paid.high))
    excess = Metric(float(paid) * ln2 - entropy, "nats/byte", low=low, high=high, n=paid.n, higher_is_better=False)
    return {**metrics, "entropy_floor": Metric(entropy, "nats/byte"), "excess_nats": excess}


def exponential(nll: Metric) -> Metric:
    """The perplexity of a mean loss. Never capped: a loss too large for a float is an error that says so."""
    try:
        low, high = (None if bound is None else math.exp(bound) for bound in (nll.low, nll.high))
        return Metric(math.exp(nll), "", low=low, high=high, n=nll.n, higher_is_better=False)
    except OverflowError as error:
        raise StreamError(
            f"the mean loss is {float(nll):.6g} nats a token; its perplexity is no number a float can hold."
        ) from error


def series_of(reading: Reading, metrics: dict[str, Metric], *, carried: bool) -> dict[str, Series]:
    """The course of a reading, by tokens read; of the state too, where one was carried through a stream."""
    chunks, each = reading.course
    some = chunks[:, TOKENS] > 0  # of frames, one may hold no code to score
    chunks, each = chunks[some], each[some]
    read = np.cumsum(chunks[:, TOKENS]).tolist()
    loss = chunks[:, NATS] / chunks[:, TOKENS]
    running = np.cumsum(chunks[:, NATS]) / np.cumsum(chunks[:, TOKENS])
    filled = np.flatnonzero(reading.by_position[:, TOKENS])
    binned = reading.by_position[filled]
    series = {
        "chunk_loss": Series(read, loss.tolist(), "tokens", "nats/token"),
        "running_loss": Series(read, running.tolist(), "tokens", "nats/token"),
        "chunk_seconds": Series(read, (chunks[:, SECONDS] / each).tolist(), "tokens", "s"),
        "loss_by_position": Series(
            (2 ** ((filled + 0.5) / 2)).tolist(), (binned[:, NATS] / binned[:, TOKENS]).tolist(), "tokens before", "nats/token"
        ),
    }
    if carried and not reading.by_document and reading.peak_state_bytes:
        series["state_bytes"] = Series(read, (chunks[:, STATE] / each).tolist(), "tokens", "bytes")
    if reached := {float(at): float(metrics[name]) for at in reading.positions if (name := name_of(at)) in metrics}:
        series["loss_at"] = Series(list(reached), list(reached.values()), "tokens before", "nats/token")
    return {**series, **({} if reading.moves is None else fast_weights.series_of(reading.moves))}


def bare_ids(ids: Iterable[Any]) -> Corpus:
    """Token ids that stand in no file, as a corpus of one document. An iterator can be read once, and is never held."""
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, list | tuple | range | np.ndarray):
        held = np.asarray(ids)
        digest = hashlib.sha256(np.ascontiguousarray(held).tobytes()).hexdigest()
        return Corpus("ids", "test", lambda: iter([Document("ids", ids=held)]), digest, tokenized=True, size=len(held))
    parts = (Document("ids", ids=np.atleast_1d(np.asarray(part))) for part in ids)
    return Corpus("ids", "test", lambda: parts, "", tokenized=True)
