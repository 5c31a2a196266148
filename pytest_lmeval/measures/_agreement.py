"""Measure how closely a model's predictions agree with those of a reference, on the same text.

The mean loss alone can hide a change (by quantization, pruning or distillation), since gains on some tokens cancel losses on
others; KL (Kullback and Leibler 1951) is never negative. Both models read the text at the same time, each in its own chunks:
memory is both models, both states and a chunk of logits of each.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from torch import Tensor

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._tokens import as_corpus, nothing_to_score, sequences
from pytest_lmeval.engine import Engine, Policy, policy_for
from pytest_lmeval.engine._tokens import Tokens, naming
from pytest_lmeval.errors import Refused, SpecError
from pytest_lmeval.measures._agreement_base import PREFIX, About, Base, BaseWriter, check_path, read as read_base
from pytest_lmeval.measures._agreement_record import merged as merged_record_of, with_numbers
from pytest_lmeval.measures._agreement_sums import TOKENS, Piece, Sums, compare
from pytest_lmeval.measures._context import current, shared_verb
from pytest_lmeval.measures._mismatch import Differences
from pytest_lmeval.measures._text_reading import Progress
from pytest_lmeval.models._failures import NoMemory, unless_full
from pytest_lmeval.models._identity import facts, fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._served import refuse_scores
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._measured import Cost, MetricValue, Record, Result
from pytest_lmeval.records._share import WHOLE, Share

LONGEST_WINDOW = 2048  # tokens of a window in which a served model and its reference read
TOP = 8  # most likely tokens that a served model is asked for


@shared_verb
def agreement(
    lm: Any,
    reference: Any,
    corpus: Corpus | str | Iterable[Any],
    *,
    tokens: int | None = None,
    limit: int | None = None,
    as_stream: bool | None = None,
    window: int | None = None,
    save: str | Path | None = None,
) -> AgreementResult:
    """Measure the agreement with `reference`, a model or a spec (see `measure_agreement` for the parameters).

    save       write what the reference says to this file. From then on it may be named in its place: reference="base:FILE"
               reads no second model, and the text as the file was written; the KL is then a lower bound

    The laws of both models are probed first, and each reads in chunks that are exact for it. If one of them is served, both
    read the same windows, and where they disagree, `explanation` says what the pattern points to.

    window  read in windows of so many tokens that do not overlap; by default only with a served model: as many as both read, at
            most 2,048
    """
    context = current()
    corpus = context.corpus(corpus)
    model, certificate = context.certified(lm)
    other: Model | Base
    theirs: Certificate | None = None
    if isinstance(reference, str) and reference.startswith(PREFIX):
        other = read_base(Path(reference.removeprefix(PREFIX)).expanduser())
        other.check_window(window, model)
        window = other.window
    else:
        other, theirs = context.certified(reference)
        if window is None and any(one.served is not None for one in (model, other)):
            window = min(LONGEST_WINDOW, *(one.limit or LONGEST_WINDOW for one in (model, other)))
    overlap = other.about.overlap if isinstance(other, Base) else 0
    cut: dict[str, Any] = {} if window is None else {"window": window, "overlap": overlap}
    policy = policy_for(model, certificate, **cut)
    their_policy = None if isinstance(other, Base) else policy_for(other, theirs, **cut)
    settings: dict[str, Any] = {
        "tokens": tokens or context.session.tokens,
        "limit": context.session.limit if limit is None else limit,
        "as_stream": as_stream,
    }
    if isinstance(other, Base):
        settings = other.taken_over(settings)
        who: list[Any] = [other.identity]
    else:
        who = [fingerprint(other), other.limit, policy_for(other, theirs, **cut).reading]
    about = [corpus.name, corpus.split, corpus.identity, tokenizer_fingerprint(model), *who, policy.reading]
    key = context.key("agreement", model, settings, about)
    if corpus.fingerprint and save is None and (finished := context.finished(key)) is not None:
        return AgreementResult(finished)
    with context.session.progress(f"{model.spec} and {other.spec} read {corpus}") as progress:
        how: dict[str, Any] = {"policy": policy, "reference_policy": their_policy, **settings}
        measure = partial(measure_agreement, model, other, corpus, **how, save=save, progress=progress)
        by_document = not (corpus.as_stream if as_stream is None else as_stream)
        same_windows = their_policy is not None and policy.windows is not None and policy.windows == their_policy.windows
        alone = their_policy is None or save is not None or not (by_document or same_windows)
        result = context.shared(key, model, lambda share: measure(share=share), merged, alone=alone)
    details = {**result.record.details, **({} if theirs is None else {"reference_verdict": theirs.verdict})}
    return context.recorded(key, replace(result, record=structs.replace(result.record, details=details)))


@dataclass(frozen=True, repr=False)
class AgreementResult(Result):
    """The result of `agreement`. Values have a 95 % interval, `.low` to `.high`, over blocks of the text, or documents:
    Wilson's score with the effective size for `agreement`, Student's t for means; NoIntervalError if the text is too short."""

    part: dict[str, Any] | None = None  # the sums of a share, from which all are merged

    agreement = MetricValue()
    """Fraction of positions where both have the same most likely token; of equally likely ones, the first counts."""
    kl = MetricValue()
    """Mean KL(reference || lm), nats a token."""
    kl_at_least = MetricValue()
    """A lower bound of the same where a served model, or a file, tells only the most likely tokens."""
    mean_exp_difference = MetricValue()
    """Mean of exp |difference of the log-probability of a target|: 1 if all are equal. Training by reinforcement on answers of
    a server takes more than 1.05 for an alarm."""
    nll_difference = MetricValue()
    """Mean loss of the lm minus that of the reference, nats a token: above zero if the lm is worse."""
    perplexity_ratio = MetricValue()
    """Perplexity of the lm over that of the reference."""
    largest_difference = MetricValue()
    """Largest difference of a log-probability, over all positions and all tokens that both find possible, nats."""

    @property
    def explanation(self) -> list[str]:
        """What the pattern of the differences points to, in words; empty if they are what the precision explains."""
        found: list[str] = self.record.details.get("explanation", [])
        return found


def measure_agreement(
    lm: Model,
    reference: Model | Base,
    corpus: Corpus | str | Iterable[Any],
    *,
    policy: Policy | None = None,
    reference_policy: Policy | None = None,
    tokens: int | None = None,
    limit: int | None = None,
    as_stream: bool | None = None,
    save: str | Path | None = None,
    progress: Progress | None = None,
    share: Share = WHOLE,
) -> AgreementResult:
    """Read a corpus with both models, or with one and what a file says of the other, and compare their predictions.

    corpus     a `Corpus`, the name of one, or token ids (tensor, array, list, iterator of arrays)
    policy     how the lm reads it, and `reference_policy` how the reference does (see `engine.policy_for`)
    tokens     read so many tokens of the stream (of each document, if read by document)
    limit      read so many documents
    as_stream  read one stream, or document by document; by default what the corpus declares
    save       write what the reference says to this file (see `_agreement_base`)
    share      of the documents, or of the windows of a stream, that are read

    If memory runs out, the model with the larger chunks reads smaller ones, from the beginning, and a note says so.

    Raises SpecError for models that cannot be compared (other vocabularies, other tokenizers on text, frames of codes),
    NotFiniteError for a KL that is not finite, with its position, and what `perplexity` raises.
    """
    source = as_corpus(corpus)
    _refuse_incomparable(lm, reference, source)
    if save is not None:
        check_path(save, reference)
    by_document = not (source.as_stream if as_stream is None else as_stream)
    engines = [Engine(lm, policy or policy_for(lm))]
    if isinstance(reference, Model):
        engines.append(Engine(reference, reference_policy or policy_for(reference)))
    began = time.perf_counter()

    def read_both() -> tuple[Sums, Differences, Counter[str], BaseWriter]:
        return _read_both(engines, reference, source, tokens, limit, by_document, progress, share, saving=save is not None)

    once = not source.fingerprint  # may be given only once: an iterator
    while isinstance(read := read_both() if once else unless_full(read_both), NoMemory):  # a state may be changed in part
        max(engines, key=lambda engine: engine.chunk_size).take_smaller_chunks(read.wanted)
    sums, differences, counts, said = read
    if not sums.units and share.is_whole:
        raise nothing_to_score(source, counts["skipped"])
    if isinstance(reference, Base):
        reference.check_length(int(sums.total[TOKENS]), source)
    chosen = {"tokens": tokens, "limit": limit, "by_document": by_document, "data": source.fingerprint}
    certificate, reading = engines[0].asked.certificate, engines[0].asked.reading
    their_reading = reference.about.reading if isinstance(reference, Base) else engines[1].asked.reading
    differences.explain(lm, reference)
    their_facts = reference.about.lm if isinstance(reference, Base) else facts(reference)
    if save is not None and isinstance(reference, Model):
        windows = engines[1].asked.windows
        about = About(
            lm=their_facts, tokenizer=tokenizer_fingerprint(reference), vocab_size=reference.vocab_size, corpus=str(source),
            data=source.fingerprint, tokens=tokens, limit=limit, by_document=by_document,
            window=None if windows is None else windows.size,
            overlap=0 if windows is None else windows.overlap, reading=their_reading,
        )  # fmt: skip
        said.write(Path(save), about)
    record = Record(
        kind="agreement",
        subject=f"{source} with {reference.spec}",
        lm=facts(lm),
        settings={
            "reference": schema.to_plain(their_facts), **chosen, **({"special_tokens": True} if source.special_tokens else {})
        },
        details={
            "read": reading, "reference_read": their_reading, "documents": len(sums.units) if by_document else 1, **counts
        },
        notes=[f"{engine.lm.spec}: {engine.less}" for engine in engines if engine.less],
        example="document" if by_document else "block",
        cost=Cost(seconds=time.perf_counter() - began),
        certificate=None if certificate is None else structs.replace(certificate, chunking_used=reading),
    )  # fmt: skip
    part = None if share.is_whole else {"sums": sums.to_json(), "differences": differences.to_json()}
    return AgreementResult(with_numbers(record, sums, differences), part)


def merged(results: Sequence[AgreementResult]) -> AgreementResult:
    """One result of those of all shares of a text."""
    parts = [result.part for result in results if result.part is not None]
    return AgreementResult(merged_record_of([result.record for result in results], parts))


def _refuse_incomparable(lm: Model, reference: Model | Base, corpus: Corpus) -> None:
    if isinstance(reference, Base):
        reference.check_reader(lm, tokenized=corpus.tokenized)
        return
    if lm.codebooks or reference.codebooks:
        raise SpecError(f"{(lm if lm.codebooks else reference).spec} reads frames of codes; agreement is about tokens.")
    advice = "so their predictions cannot be compared. Compare their bits per byte (lmeval.perplexity)"
    served = [one for one in (lm, reference) if one.served is not None]
    for one in served:
        assert one.served is not None
        refuse_scores(one.served, one.spec)
        if one.served.facts.kind == "OpenAI-compatible":
            raise Refused(
                f"{one.spec} tells the texts of its most likely tokens, not their ids; agreement needs vLLM or SGLang."
            )
    if not served and lm.vocab_size != reference.vocab_size:  # a server tells that of its tokenizer
        raise SpecError(f"{lm.spec} has {lm.vocab_size:,} tokens and {reference.spec} has {reference.vocab_size:,}, {advice}.")
    if not corpus.tokenized and tokenizer_fingerprint(lm) != tokenizer_fingerprint(reference):
        encode = "have tokenizers that encode the same text differently"
        raise SpecError(f"{lm.spec} and {reference.spec} {encode}, {advice}, or give both ids.")


def _read_both(
    engines: list[Engine],
    reference: Model | Base,
    corpus: Corpus,
    tokens: int | None,
    limit: int | None,
    by_document: bool,
    progress: Progress | None,
    share: Share,
    *,
    saving: bool,
) -> tuple[Sums, Differences, Counter[str], BaseWriter]:
    """The sums over the text, the difference of each loss, how many documents were skipped and special tokens written, and what
    the reference said, if it is saved."""
    counts, sums, differences, said = Counter[str](), Sums(by_document), Differences(), BaseWriter()
    sums.exact = isinstance(reference, Model) and all(engine.lm.served is None for engine in engines)
    for engine in engines:
        engine.on_logits, engine.top = None, TOP  # it holds the last logits of an attempt that ran out of memory
    texts = tee(corpus.documents(), len(engines))  # an iterator can be read once; tee holds only what one model is ahead
    read = [
        _read(engine, replace(corpus, documents=partial(iter, text)), tokens, limit, by_document, counted, share)
        for engine, text, counted in zip(engines, texts, (counts, Counter[str]()), strict=False)
    ]
    if isinstance(reference, Base):
        read.append(reference.pieces())
    for ours, theirs in _aligned(read[0], read[1], reference if isinstance(reference, Base) else None, corpus):
        if isinstance(reference, Base):
            reference.check_piece(ours, theirs, corpus)
        sums.add(ours, *compare(ours, theirs, engines[0].lm, reference))
        differences.add(ours, theirs)
        if saving:
            said.add(theirs)
        if progress is not None:
            progress(int(sums.total[TOKENS]), sums.nats, None)
    return sums, differences, counts, said


def _read(
    engine: Engine,
    corpus: Corpus,
    tokens: int | None,
    limit: int | None,
    by_document: bool,
    counts: Counter[str],
    share: Share,
) -> Iterator[Piece]:
    """Each chunk of one model, with the logits or the likeliest tokens that it was scored from. Counts documents without a
    target as `skipped`, and `special_tokens`."""
    last: deque[Tensor] = deque(maxlen=1)
    engine.on_logits = last.append
    of_documents, of_windows = (share, WHOLE) if by_document else (WHOLE, share)
    for ids in sequences(engine.lm, corpus, by_document=by_document, limit=limit, tokens=tokens, share=of_documents):
        if by_document and ids.is_empty:
            counts["skipped"] += 1
            continue
        with naming(f"{corpus}, document {ids.number}" if by_document else str(corpus)):
            held = _Held(ids)
            for chunk in engine.stream(held, share=of_windows):
                logits = None if engine.lm.served is not None else last[0][0, -len(chunk.nll) :]
                targets, offsets = held.take(chunk.start, chunk.end), np.arange(chunk.start, chunk.end) - chunk.window
                yield Piece(ids.number, chunk.start, targets, chunk.nll, logits, chunk.top, offsets)
        counts.update({"special_tokens": ids.special} if ids.special else ())


class _Held:
    """The tokens of a text as they are read, of which those that are not taken yet are held."""

    def __init__(self, tokens: Iterable[Tokens]) -> None:
        self._tokens, self._ids, self._begin = tokens, np.empty(0, dtype=np.int64), 0

    def __iter__(self) -> Iterator[Tokens]:
        for part in self._tokens:
            self._ids = np.concatenate([self._ids, part.ids])
            yield part

    def take(self, start: int, end: int) -> np.ndarray:
        """The ids from `start` to `end`; those before them are dropped."""
        found = self._ids[start - self._begin : end - self._begin]
        self._ids, self._begin = self._ids[end - self._begin :], end
        return found


def _aligned(
    ours: Iterator[Piece], theirs: Iterator[Piece], base: Base | None, corpus: Corpus
) -> Iterator[tuple[Piece, Piece]]:
    """Pairs of pieces of the same targets, whatever the chunks of each. Raises SpecError for text past the end of a base."""
    one, other = next(ours, None), next(theirs, None)
    while one is not None and other is not None:
        count = min(len(one.nll), len(other.nll))
        yield one.part(0, count), other.part(0, count)
        one = one.part(count) if count < len(one.nll) else next(ours, None)
        other = other.part(count) if count < len(other.nll) else next(theirs, None)
    if base is not None and one is not None:
        raise base.longer(corpus)
