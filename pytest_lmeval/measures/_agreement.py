"""Measure how closely a model's predictions agree with those of a reference, on the same text.

The mean loss alone can hide a change (by quantization, pruning or distillation), since gains on some tokens cancel losses on
others; KL (Kullback and Leibler 1951) is never negative. Both models read the text at the same time, each in its own chunks:
memory is both models, both states and a chunk of logits of each.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import tee
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._tokens import as_corpus, notes_on, nothing_to_score, sequences
from pytest_lmeval.engine import Engine, Policy, policy_for
from pytest_lmeval.engine._losses import LOGITS_AT_ONCE
from pytest_lmeval.engine._tokens import naming
from pytest_lmeval.errors import NotFiniteError, SpecError
from pytest_lmeval.measures._context import current, verb
from pytest_lmeval.measures._text_reading import Progress
from pytest_lmeval.models._failures import NoMemory, unless_full
from pytest_lmeval.models._identity import facts, fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._measured import Cost, MetricValue, Record, Result
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._loss_accumulator import BLOCK, add_to_blocks
from pytest_lmeval.scoring._loss_metrics import exponential
from pytest_lmeval.statistics._estimate import ratio_intervals
from pytest_lmeval.statistics._proportion import wilson_of_sums

TOKENS, SAME, KL, DIFFERENCE = range(4)  # columns of a row of sums


@verb
def agreement(
    lm: Any,
    reference: Any,
    corpus: Corpus | str | Iterable[Any],
    *,
    tokens: int | None = None,
    limit: int | None = None,
    as_stream: bool | None = None,
) -> AgreementResult:
    """Measure the agreement with `reference`, a model or a spec (see `measure_agreement` for the parameters).

    The laws of both models are probed first, and each reads in chunks that are exact for it.
    """
    context = current()
    corpus = context.corpus(corpus)
    (model, certificate), (other, theirs) = context.certified(lm), context.certified(reference)
    policy, their_policy = policy_for(model, certificate), policy_for(other, theirs)
    settings: dict[str, Any] = {
        "tokens": tokens or context.session.tokens,
        "limit": context.session.limit if limit is None else limit,
        "as_stream": as_stream,
    }
    about = [corpus.name, corpus.split, corpus.identity, tokenizer_fingerprint(model), fingerprint(other), other.limit]
    key = context.key("agreement", model, settings, [*about, policy.reading, their_policy.reading])
    if corpus.fingerprint and (finished := context.finished(key)) is not None:
        return AgreementResult(finished)
    with context.session.progress(f"{model.spec} and {other.spec} read {corpus}") as progress:
        result = measure_agreement(
            model, other, corpus, policy=policy, reference_policy=their_policy, **settings, progress=progress
        )
    details = {**result.record.details, "reference_verdict": theirs.verdict}
    return context.recorded(key, replace(result, record=structs.replace(result.record, details=details)))


@dataclass(frozen=True, repr=False)
class AgreementResult(Result):
    """The result of `agreement`. Values have a 95 % interval, `.low` to `.high`, over blocks of the text, or documents:
    Wilson's score with the effective size for `agreement`, Student's t for means; NoIntervalError if the text is too short."""

    agreement = MetricValue()
    """Fraction of positions where both have the same most likely token; of equally likely ones, the first counts."""
    kl = MetricValue()
    """Mean KL(reference || lm), nats a token."""
    nll_difference = MetricValue()
    """Mean loss of the lm minus that of the reference, nats a token: above zero if the lm is worse."""
    perplexity_ratio = MetricValue()
    """Perplexity of the lm over that of the reference."""
    largest_difference = MetricValue()
    """Largest difference of a log-probability, over all positions and all tokens that both find possible, nats."""


def measure_agreement(
    lm: Model,
    reference: Model,
    corpus: Corpus | str | Iterable[Any],
    *,
    policy: Policy | None = None,
    reference_policy: Policy | None = None,
    tokens: int | None = None,
    limit: int | None = None,
    as_stream: bool | None = None,
    progress: Progress | None = None,
) -> AgreementResult:
    """Read a corpus with both models and compare their predictions at each position.

    corpus     a `Corpus`, the name of one, or token ids (tensor, array, list, iterator of arrays)
    policy     how the lm reads it, and `reference_policy` how the reference does (see `engine.policy_for`)
    tokens     read so many tokens of the stream (of each document, if read by document)
    limit      read so many documents
    as_stream  read one stream, or document by document; by default what the corpus declares

    If memory runs out, the model with the larger chunks reads smaller ones, from the beginning, and a note says so.

    Raises SpecError for models that cannot be compared (other vocabularies, other tokenizers on text, frames of codes),
    NotFiniteError for a KL that is not finite, with its position, and what `perplexity` raises.
    """
    source = as_corpus(corpus)
    _refuse_incomparable(lm, reference, source)
    by_document = not (source.as_stream if as_stream is None else as_stream)
    policies = [policy or policy_for(lm), reference_policy or policy_for(reference)]
    engines = [Engine(model, chosen) for model, chosen in zip((lm, reference), policies, strict=True)]
    began = time.perf_counter()

    def read_both() -> tuple[_Sums, Counter[str]]:
        return _read_both(engines, source, tokens, limit, by_document, progress)

    once = not source.fingerprint  # may be given only once: an iterator
    while isinstance(read := read_both() if once else unless_full(read_both), NoMemory):  # a state may be changed in part
        max(engines, key=lambda engine: engine.chunk_size).take_smaller_chunks(read.wanted)
    sums, counts = read
    if not sums.units:
        raise nothing_to_score(source, counts["skipped"])
    chosen = {"tokens": tokens, "limit": limit, "by_document": by_document, "data": source.fingerprint}
    certificate = policies[0].certificate
    record = Record(
        kind="agreement",
        subject=f"{source} with {reference.spec}",
        lm=facts(lm),
        settings={"reference": schema.to_plain(facts(reference)), **chosen},
        details={"read": policies[0].reading, "reference_read": policies[1].reading, **counts},
        notes=[
            *notes_on(source, len(sums.units), counts["skipped"], counts["special_tokens"]),
            *(f"{engine.lm.spec}: {engine.less}" for engine in engines if engine.less),
        ],
        example="document" if by_document else "block",
        metrics=_metrics(sums),
        cost=Cost(seconds=time.perf_counter() - began, tokens=int(sums.total[TOKENS])),
        certificate=None if certificate is None else structs.replace(certificate, chunking_used=policies[0].reading),
    )
    return AgreementResult(record)


def _refuse_incomparable(lm: Model, reference: Model, corpus: Corpus) -> None:
    if lm.codebooks or reference.codebooks:
        raise SpecError(f"{(lm if lm.codebooks else reference).spec} reads frames of codes; agreement is about tokens.")
    advice = "so their predictions cannot be compared. Compare their bits per byte (lmeval.perplexity)"
    if lm.vocab_size != reference.vocab_size:
        raise SpecError(f"{lm.spec} has {lm.vocab_size:,} tokens and {reference.spec} has {reference.vocab_size:,}, {advice}.")
    if not corpus.tokenized and tokenizer_fingerprint(lm) != tokenizer_fingerprint(reference):
        encode = "have tokenizers that encode the same text differently"
        raise SpecError(f"{lm.spec} and {reference.spec} {encode}, {advice}, or give both ids.")


def _read_both(
    engines: list[Engine], corpus: Corpus, tokens: int | None, limit: int | None, by_document: bool, progress: Progress | None
) -> tuple[_Sums, Counter[str]]:
    """The sums over the text, and how many documents were skipped and special tokens written in it."""
    counts, sums = Counter[str](), _Sums(by_document)
    for engine in engines:
        engine.on_logits = None  # it holds the last logits of an attempt that ran out of memory
    texts = tee(corpus.documents())  # an iterator can be read once; tee holds only what one model is ahead
    read = [
        _read(engine, replace(corpus, documents=partial(iter, text)), tokens, limit, by_document, counted)
        for engine, text, counted in zip(engines, texts, (counts, Counter[str]()), strict=True)
    ]
    for ours, theirs in _aligned(*read):
        sums.add(ours, *_compare(ours, theirs, engines[0].lm, engines[1].lm))
        if progress is not None:
            progress(int(sums.total[TOKENS]), sums.nats, None)
    return sums, counts


@dataclass(frozen=True)
class _Piece:
    """The logits [n, v] and losses [n] of targets `start`, `start` + 1, ... of a document."""

    document: int
    start: int
    logits: Tensor
    nll: np.ndarray

    def part(self, begin: int, end: int | None = None) -> _Piece:
        return replace(self, start=self.start + begin, logits=self.logits[begin:end], nll=self.nll[begin:end])


def _read(
    engine: Engine, corpus: Corpus, tokens: int | None, limit: int | None, by_document: bool, counts: Counter[str]
) -> Iterator[_Piece]:
    """Each chunk of one model, with the logits that it was scored from. Counts documents without a target as `skipped`, and
    `special_tokens`."""
    last: deque[Tensor] = deque(maxlen=1)
    engine.on_logits = last.append
    for document, ids in enumerate(sequences(engine.lm, corpus, by_document=by_document, limit=limit, tokens=tokens)):
        if by_document and ids.is_empty:
            counts["skipped"] += 1
            continue
        with naming(f"{corpus}, document {document}" if by_document else str(corpus)):
            for chunk in engine.stream(ids):
                yield _Piece(document - counts["skipped"], chunk.start, last[0][0, -len(chunk.nll) :], chunk.nll)
        counts.update({"special_tokens": ids.special} if ids.special else ())


def _aligned(ours: Iterator[_Piece], theirs: Iterator[_Piece]) -> Iterator[tuple[_Piece, _Piece]]:
    """Pairs of pieces of the same targets, whatever the chunks of each model."""
    one, other = next(ours, None), next(theirs, None)
    while one is not None and other is not None:
        count = min(len(one.nll), len(other.nll))
        yield one.part(0, count), other.part(0, count)
        one = one.part(count) if count < len(one.nll) else next(ours, None)
        other = other.part(count) if count < len(other.nll) else next(theirs, None)


def _compare(ours: _Piece, theirs: _Piece, lm: Model, reference: Model) -> tuple[np.ndarray, float]:
    """Rows [n, 4] of single targets, and the largest difference of a log-probability, computed in blocks of targets."""
    block = max(1, LOGITS_AT_ONCE // lm.vocab_size)
    device = ours.logits.device if ours.logits.device.type == "cuda" else torch.device("cpu")  # not all others have float64
    rows, largest = np.ones((len(ours.nll), 4)), 0.0
    rows[:, DIFFERENCE] = ours.nll - theirs.nll
    for begin in range(0, len(rows), block):
        q, p = (piece.logits[begin : begin + block].to(device) for piece in (ours, theirs))
        rows[begin : begin + block, SAME] = (q.argmax(-1) == p.argmax(-1)).cpu().numpy()
        log_q, log_p = q.double().log_softmax(-1), p.double().log_softmax(-1)
        gap = log_p - log_q
        kl = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * gap)
        rows[begin : begin + block, KL] = kl.sum(-1).cpu().numpy()
        if not kl.isfinite().all():
            row, token = (int(index) for index in (~kl.isfinite()).nonzero()[0])
            raise NotFiniteError(
                f"KL is not finite at token {ours.start + begin + row} of document {ours.document}: the log-probability of id "
                f"{token} is {log_p[row, token]:.6g} in {reference.spec} and {log_q[row, token]:.6g} in {lm.spec}. Look "
                "for an overflow, or a masked-out logit."
            )
        largest = max(largest, float(gap[(log_p > -torch.inf) & (log_q > -torch.inf)].abs().max()))
    return rows, largest


@dataclass
class _Sums:
    """Sums over all targets, and over documents or blocks of the stream."""

    by_document: bool
    units: list[np.ndarray] = field(default_factory=list)
    total: np.ndarray = field(default_factory=lambda: np.zeros(4))
    largest: float = 0.0
    nats: float = 0.0
    block: int = BLOCK

    def add(self, piece: _Piece, rows: np.ndarray, largest: float) -> None:
        self.total += rows.sum(axis=0)
        self.nats += float(piece.nll.sum())
        self.largest = max(self.largest, largest)
        if not self.by_document:
            self.block = add_to_blocks(self.units, self.block, piece.start, rows)
            return
        if piece.document == len(self.units):
            self.units.append(np.zeros(4))
        self.units[-1] += rows.sum(axis=0)


def _metrics(sums: _Sums) -> dict[str, Value]:
    units, n = np.array(sums.units), int(sums.total[TOKENS])
    same = wilson_of_sums(units[:, [SAME, TOKENS]], consecutive=not sums.by_document)
    ratios = [(KL, TOKENS), (DIFFERENCE, TOKENS)]
    around_kl, around_difference = ratio_intervals(units, ratios, consecutive=not sums.by_document)
    difference = value_of("nll_difference", sums.total[DIFFERENCE] / n, around_difference, n=n)
    return {
        "agreement": value_of("agreement", sums.total[SAME] / n, same, n=n),
        "kl": value_of("kl", sums.total[KL] / n, around_kl, n=n),
        "nll_difference": difference,
        "perplexity_ratio": exponential(difference, "perplexity_ratio"),
        "largest_difference": value_of("largest_difference", sums.largest, n=n),
    }
