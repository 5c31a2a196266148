"""Perplexity of a corpus, and everything else that one reading of it tells.

    perplexity     exp(nats / tokens)                  depends on the tokenizer
    bits_per_byte  nats / ln 2 / bytes                 comparable between tokenizers; bytes of the original text
    token_accuracy share of targets among the model's first k choices

The reading carries the state through the whole text where the model allows it; where it has no state, or a
limited context, the text is read in overlapping windows, and the record says so.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from pytest_lmeval.data.corpus import Corpus, Document
from pytest_lmeval.data.tokens import TokenReader
from pytest_lmeval.lm import Model, State
from pytest_lmeval.results.journal import Checkpoints
from pytest_lmeval.results.metric import Metric
from pytest_lmeval.results.record import Record, Series
from pytest_lmeval.scoring.reading import BYTES, HITS, NATS, SECONDS, TOKENS, Reading, rows_of
from pytest_lmeval.statistics.bootstrap import ratio_intervals
from pytest_lmeval.stream import Chunk, StreamError, default_chunk_size, stream, stream_in_windows

Progress = Callable[[int, float, int | None], None]
"""Called after each chunk with the tokens scored, the nats so far, and the tokens expected (None: unknown)."""


@dataclass(frozen=True, repr=False)
class PerplexityResult:
    """What a reading found. Numbers carry `.low` and `.high`, their 95 % interval (bootstrap over documents, or over
    blocks of one stream; None where the text is too short for one)."""

    record: Record
    resumed_at: int = 0  # tokens that an interrupted run had already scored

    def __repr__(self) -> str:
        return repr(self.record)

    @property
    def perplexity(self) -> Metric:
        """exp of the mean loss a token."""
        return self.record.metrics["perplexity"]

    @property
    def nll(self) -> Metric:
        """Mean negative log-likelihood, nats a token."""
        return self.record.metrics["nll"]

    @property
    def bits_per_byte(self) -> Metric:
        """Bits a byte of the original text; only for corpora of text."""
        if "bits_per_byte" not in self.record.metrics:
            raise AttributeError(f"{self.record.subject} holds token ids, no text: there are no bytes to divide by.")
        return self.record.metrics["bits_per_byte"]

    @property
    def token_accuracy(self) -> dict[int, Metric]:
        """Share of targets among the model's first k choices, by k."""
        return {k: self.record.metrics[f"token_accuracy_top{k}"] for k in HITS}

    @property
    def tokens(self) -> int:
        """Target tokens scored, each exactly once."""
        return int(self.record.cost["tokens"])

    @property
    def tokens_per_second(self) -> Metric:
        return self.record.metrics["tokens_per_second"]

    @property
    def seconds(self) -> float:
        return float(self.record.cost["seconds"])

    @property
    def state_bytes(self) -> int:
        """The most memory that the carried state took."""
        return int(self.record.cost["state_bytes"])

    @property
    def chunks(self) -> int:
        return int(self.record.settings["chunks"])

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
    def loss_at(self) -> dict[int, float]:
        """Mean loss of the thousand tokens up to each chosen position that was reached."""
        series = self.record.series.get("loss_at")
        return {} if series is None else dict(zip(map(int, series.x), series.y, strict=True))

    @property
    def loss_slope(self) -> Metric:
        """Least-squares slope of `loss_at`, nats a token per 1000 positions: negative where context goes on helping."""
        return self.record.metrics["loss_slope"]

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The verdict that the reading stands on."""
        return self.record.certificate


@dataclass(frozen=True)
class Plan:
    """How a text is read: state carried in chunks (`window` None), or in windows that forget one another."""

    chunk_size: int
    window: int | None = None
    overlap: int = 0
    why: str = "the state is carried"

    def read(self, lm: Model, ids: Iterable[Any], state: State | None, position: int) -> Iterator[Chunk]:
        if self.window is None:
            return stream(lm, ids, chunk_size=self.chunk_size, state=state, position=position)
        return stream_in_windows(
            lm,
            ids,
            window=self.window,
            overlap=self.overlap,
            chunk_size=self.chunk_size if lm.stateful else None,
            position=position,
        )


def plan_for(
    lm: Model, *, chunk_size: int | None = None, window: int | Literal["unlimited"] | None = None, overlap: int | None = None
) -> Plan:
    """How to read with `lm`: carried where it has a state and no limit to its context, else in windows.

    window   tokens of a window; by default the model's context if it is limited, or a chunk if it has no state;
             "unlimited" carries the state past the context that the model was made for
    overlap  tokens of a window that are only read, not scored; half of it by default
    """
    chunk = chunk_size or default_chunk_size(lm.vocab_size)
    if window == "unlimited" and not lm.stateful:
        raise StreamError(f"{lm.spec} has no state to carry: it can only be read in windows.")
    if window is None and not lm.stateful:
        window, why = min(chunk, lm.context_length or chunk), "the model has no state to carry"
    elif window is None and lm.context_length is not None:
        window, why = lm.context_length, f"the model's context is {lm.context_length} tokens"
    else:
        why = "windows were asked for"
    if window is None or window == "unlimited":
        return Plan(chunk)
    overlap = window // 2 if overlap is None else overlap
    return Plan(min(chunk, window), window, overlap, why)


def perplexity(
    lm: Model,
    corpus: Corpus | Iterable[Any],
    *,
    chunk_size: int | None = None,
    tokens: int | None = None,
    limit: int | None = None,
    as_stream: bool | None = None,
    window: int | Literal["unlimited"] | None = None,
    overlap: int | None = None,
    positions: tuple[int, ...] = (),
    losses: str | Path | None = None,
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
    as_stream   one endless stream, or document by document with a new state each; by default as the corpus is meant
    window, overlap, chunk_size    see `plan_for`
    positions   places at which the loss is wanted, for example (8000, 16000, 24000)
    losses      write the loss of every target to this .npy file (float32, nats), as it is read
    checkpoints, key    save a point to go on from now and then, and start from the last one

    Raises StreamError, NotFiniteError and CorpusError; see there.
    """
    source = corpus if isinstance(corpus, Corpus) else bare_ids(corpus)
    by_document = not (source.as_stream if as_stream is None else as_stream)
    plan = plan_for(lm, chunk_size=chunk_size, window=window, overlap=overlap)
    reader = _Reader(lm, source, plan, tokens, limit, by_document)
    saver = _Saver(checkpoints, key)
    point = saver.load(lm) or _Point(Reading(by_document, tuple(positions)))
    resumed_at = int(point.reading.total[TOKENS])

    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    began = time.perf_counter() - point.seconds
    with _Losses(losses, resumed_at) as file:
        for point in reader.read(point):  # noqa: B020 - each point follows from the one before
            file.write(point.nll)
            if progress is not None:
                sums = point.reading.total
                progress(int(sums[TOKENS]), float(sums[NATS]), expected_tokens(source, sums, tokens, by_document))
            saver.save_now_and_then(replace(point, seconds=time.perf_counter() - began))
    if not point.reading.chunks_seen:
        raise StreamError(f"{source} holds no document: there is nothing to score.")
    record = Record(
        kind="perplexity",
        subject=str(source),
        lm=lm.facts(),
        settings={
            "chunk_size": plan.chunk_size,
            "reading": "carried" if plan.window is None else "windows",
            "window": plan.window,
            "overlap": plan.overlap,
            "why": plan.why,
            "by_document": by_document,
            "documents": len(point.reading.units) if by_document else None,
            "tokens": tokens,
            "limit": limit,
            "chunks": point.reading.chunks_seen,
            "tokenizer": lm.tokenizer.name if lm.tokenizer and not source.tokenized else None,
            "unit": "document" if by_document else f"block of {point.reading.block} tokens",
            "data": source.fingerprint,
            "seed": seed,
        },
        metrics=metrics_of(point.reading, seconds=time.perf_counter() - began, seed=seed),
        cost={
            "seconds": time.perf_counter() - began,
            "tokens": int(point.reading.total[TOKENS]),
            "peak_bytes": torch.cuda.max_memory_allocated(lm.device) if lm.device.type == "cuda" else None,
            "state_bytes": point.reading.peak_state_bytes,
        },
        certificate=certificate,
        series=series_of(point.reading),
        examples=str(losses) if losses is not None else None,
    )
    return PerplexityResult(record, resumed_at)


def expected_tokens(corpus: Corpus, sums: np.ndarray, tokens: int | None, by_document: bool) -> int | None:
    """How many targets the whole reading will have: known for ids, estimated from the bytes read so far for text."""
    known = tokens - 1 if tokens and not by_document else None
    if corpus.size is None or (by_document and tokens):
        return known
    whole = corpus.size - 1 if corpus.tokenized else round(corpus.size * sums[TOKENS] / max(sums[BYTES], 1))
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
    reached = reading.at_positions[:, TOKENS] > 0
    if reached.sum() > 1:
        at = np.array(reading.positions)[reached] / 1000
        losses = reading.at_positions[reached, NATS] / reading.at_positions[reached, TOKENS]
        slope = float(np.polyfit(at, losses, 1)[0])
        metrics["loss_slope"] = Metric(slope, "nats per 1000 tokens", n=int(reached.sum()), higher_is_better=False)
    return metrics


def exponential(nll: Metric) -> Metric:
    """The perplexity of a mean loss. Never capped: a loss too large for a float is an error that says so."""
    try:
        low, high = (None if bound is None else math.exp(bound) for bound in (nll.low, nll.high))
        return Metric(math.exp(nll), "", low=low, high=high, n=nll.n, higher_is_better=False)
    except OverflowError as error:
        raise StreamError(
            f"the mean loss is {float(nll):.6g} nats a token; its perplexity is no number a float can hold."
        ) from error


def series_of(reading: Reading) -> dict[str, Series]:
    chunks = np.array(reading.chunks)
    read = np.cumsum(chunks[:, TOKENS]).tolist()
    loss = chunks[:, NATS] / chunks[:, TOKENS]
    running = np.cumsum(chunks[:, NATS]) / np.cumsum(chunks[:, TOKENS])
    filled = np.flatnonzero(reading.by_position[:, TOKENS])
    binned = reading.by_position[filled]
    series = {
        "chunk_loss": Series(read, loss.tolist(), "tokens", "nats/token"),
        "running_loss": Series(read, running.tolist(), "tokens", "nats/token"),
        "chunk_seconds": Series(read, (chunks[:, SECONDS] / reading.chunks_a_row).tolist(), "tokens", "s"),
        "loss_by_position": Series(
            (2 ** ((filled + 0.5) / 2)).tolist(), (binned[:, NATS] / binned[:, TOKENS]).tolist(), "tokens before", "nats/token"
        ),
    }
    reached = reading.at_positions[:, TOKENS] > 0
    if reached.any():
        at, sums = np.array(reading.positions)[reached], reading.at_positions[reached]
        series["loss_at"] = Series(at.tolist(), (sums[:, NATS] / sums[:, TOKENS]).tolist(), "tokens before", "nats/token")
    return series


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


@dataclass(frozen=True)
class _Point:
    """A place in a corpus between two chunks: enough to go on from there with the same final numbers."""

    reading: Reading
    document: int = 0  # documents before the current one
    position: int = 0  # tokens of the current sequence that were read
    state: State = None
    seconds: float = 0.0
    nll: np.ndarray | None = None  # of the chunk that led here


@dataclass(frozen=True)
class _Reader:
    lm: Model
    corpus: Corpus
    plan: Plan
    tokens: int | None
    limit: int | None
    by_document: bool

    def read(self, point: _Point) -> Iterator[_Point]:
        """The points after each chunk, from `point` on."""
        for index, documents in self._sequences():
            if index < point.document:
                continue
            resumed = index == point.document and point.position > 0
            if not resumed:
                point.reading.start_document()
                point = replace(point, document=index, position=0, state=None)
            scored = point.position + (self._reread() if resumed else 0)
            ids = TokenReader(self.lm, documents, skip=point.position, scored=scored, limit=self.tokens)
            try:
                for chunk in self.plan.read(self.lm, ids, point.state, point.position):
                    rows = rows_of(chunk.nll, chunk.rank, ids.take_bytes(len(chunk.nll)))
                    point.reading.add(chunk.start, rows, seconds=chunk.seconds, state_bytes=chunk.state_bytes)
                    point = replace(point, position=chunk.end - 1 - self._reread(), state=chunk.state, nll=chunk.nll)
                    yield point
            except StreamError as error:
                where = f"{self.corpus}" + (f", document {index}" if self.by_document else "")
                raise StreamError(f"{where}: {error}") from error

    def _reread(self) -> int:
        return self.plan.overlap if self.plan.window is not None else 0

    def _sequences(self) -> Iterator[tuple[int, Iterable[Document]]]:
        documents = self.corpus.documents()
        if self.limit is not None:
            documents = (document for document, _ in zip(documents, range(self.limit), strict=False))
        if not self.by_document:
            yield 0, documents
            return
        for index, document in enumerate(documents):
            yield index, [document]


class _Saver:
    """Saves a point every two seconds, or less often where that would take more than one percent of the time."""

    PAUSE, SHARE = 2.0, 100.0

    def __init__(self, checkpoints: Checkpoints | None, key: str) -> None:
        self.checkpoints, self.key = checkpoints, key
        self.next = time.perf_counter() + self.PAUSE

    def save_now_and_then(self, point: _Point) -> None:
        if self.checkpoints is None or time.perf_counter() < self.next:
            return
        began = time.perf_counter()
        meta = json.dumps(
            {
                "document": point.document,
                "position": point.position,
                "seconds": point.seconds,
                "reading": point.reading.to_json(),
            }
        )

        def save(file: IO[bytes]) -> None:
            torch.save({"meta": meta, "state": point.state}, file)

        try:
            self.checkpoints.write(self.key, save)
        except (AttributeError, TypeError, NotImplementedError):
            self.checkpoints = None  # a state that cannot be written: the stream starts over if it is killed
        took = time.perf_counter() - began
        self.next = time.perf_counter() + max(self.PAUSE, self.SHARE * took)

    def load(self, lm: Model) -> _Point | None:
        if self.checkpoints is None:
            return None
        saved = self.checkpoints.read(self.key, lambda file: load_state(file, lm))
        if saved is None:
            return None
        meta = json.loads(saved["meta"])
        reading = Reading.from_json(meta.pop("reading"))
        return _Point(reading, state=saved["state"], **meta)


def load_state(file: IO[bytes], lm: Model) -> Any:
    """Unpickle nothing but tensors, and classes of the packages that the model itself comes from."""
    content = file.read()
    trusted = {"pytest_lmeval", "transformers", "collections", type(lm.module).__module__.partition(".")[0]}
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    allowed = [_global(name) for name in names if name.partition(".")[0] in trusted]
    with torch.serialization.safe_globals(allowed):
        return torch.load(io.BytesIO(content), map_location=lm.device, weights_only=True)


def _global(name: str) -> Any:
    import pkgutil

    return pkgutil.resolve_name(name)


class _Losses:
    """Losses appended to a .npy file as they come; its header, padded for growth, is written again at the end."""

    def __init__(self, path: str | Path | None, already: int) -> None:
        self.path, self.count = path, already

    def __enter__(self) -> _Losses:
        if self.path is not None:
            resumed = self.count and Path(self.path).exists()
            self.file = open(self.path, "r+b" if resumed else "w+b")
            self._write_header()
            self.file.truncate(self.file.tell() + 4 * self.count)
            self.file.seek(0, io.SEEK_END)
        return self

    def write(self, nll: np.ndarray | None) -> None:
        if self.path is not None and nll is not None:
            self.file.write(nll.astype("<f4").tobytes())
            self.count += len(nll)

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._write_header()
            self.file.close()

    def _write_header(self) -> None:
        self.file.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.file, header)
