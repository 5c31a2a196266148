"""Measure perplexity, bits per byte, accuracy, and the loss by position in one pass over a corpus."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._tokens import as_corpus, nothing_to_score
from pytest_lmeval.engine import Engine, Policy, policy_for
from pytest_lmeval.engine._policy import Window
from pytest_lmeval.errors import StreamError
from pytest_lmeval.measures._context import current, shared_verb
from pytest_lmeval.measures._text_reading import Progress, TextReading
from pytest_lmeval.measures._text_record import merged as merged_record_of, record_of
from pytest_lmeval.models._identity import tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._journal import Checkpoints
from pytest_lmeval.records._measured import MetricValue, Result, Series
from pytest_lmeval.records._share import WHOLE, Share
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring import _fast_weights as fast_weights
from pytest_lmeval.scoring._loss_accumulator import HITS, Beginning, LossAccumulator
from pytest_lmeval.scoring._loss_metrics import name_of
from pytest_lmeval.scoring._text_files import write_units


@shared_verb
def perplexity(
    lm: Any,
    corpus: Corpus | str | Iterable[Any],
    chunk_size: int | None = None,
    tokens: int | None = None,
    *,
    limit: int | None = None,
    as_stream: bool | None = None,
    window: Window = None,
    overlap: int | None = None,
    positions: tuple[int, ...] = (),
    losses: bool | str | Path = False,
    invariant: bool = False,
) -> PerplexityResult:
    """Measure perplexity, bits per byte, accuracy and loss by position (see `measure_perplexity` for the parameters).

    A corpus may be given by its name, `lmeval.perplexity(lm, "stdlib")`; `corpus("stdlib", "train")` chooses a split, too.

    The model's laws are probed first, and its state is carried only in an exact way; the record says which.
    window="lm_eval" reads each document as loglikelihood_rolling of lm-evaluation-harness and gives the same bits_per_byte; its
    byte_perplexity is 2 ** bits_per_byte. Of its task wikitext only the losses can be compared, since it reads a detokenized
    page there, and counts the bytes of the original one.
    losses=True writes the loss of every token to a file in the output folder; a path names the file.

    chunk_size  tokens a step; by default as many as are exact and fit the memory
    window      read in windows of so many tokens, "lm_eval", or "unlimited": carry the state past the model's context limit; by
                default carry the state, or read windows where the model has a context limit or no state
    overlap     tokens of a window that are read but not scored; by default half of it
    invariant   pad the last chunk, so that a loss does not depend on where the text ends, to the last bit
    """
    context = current()
    corpus = context.corpus(corpus)
    model, certificate = context.certified(lm)
    policy = policy_for(model, certificate, chunk_size=chunk_size, window=window, overlap=overlap, invariant=invariant)
    settings: dict[str, Any] = {
        "tokens": tokens or context.session.tokens,
        "limit": context.session.limit if limit is None else limit,
        "as_stream": as_stream,
        "positions": positions,
    }
    data = [corpus.name, corpus.split, corpus.identity, tokenizer_fingerprint(model), policy.reading, str(losses)]
    key = context.key("perplexity", model, settings, data)
    known = bool(corpus.fingerprint)  # an iterator may give other tokens the next time
    if known and (finished := context.finished(key)) is not None:
        return PerplexityResult(finished)
    journal = context.session.journal
    by_document = reads_by_document(policy, corpus, as_stream)
    # A carried state is handed from chunk to chunk; losses, and fast weights, are in the order of the text.
    alone = (not by_document and policy.windows is None) or bool(losses) or model.fast_weights is not None
    divided = not alone and (context.ranks is not None or not context.session.share.is_whole)
    units = context.file("units.jsonl")
    examples = context.file("losses.npy") if losses is True else None
    if losses is True and examples is None:
        raise StreamError("losses=True writes to the output folder of a run; outside of tests, name a file: losses=PATH.")
    with context.session.progress(f"{model.spec} reads {corpus}") as progress:
        measure = partial(
            measure_perplexity,
            model,
            corpus,
            policy=policy,
            **settings,
            losses=context.path(examples) if losses is True else losses or None,
            units=None if divided else context.path(units),
            progress=progress,
            # A model that spans the ranks would be resumed at another point on each.
            checkpoints=journal.checkpoints if journal and known and policy.resume and not model.spans_ranks else None,
            key=context.own_key(key),
        )
        result = context.shared(key, model, lambda share: measure(share=share), merged, alone=alone)
    if result.resumed_at:
        context.log.notes.append(f"{model.spec} on {corpus}: resumed at token {result.resumed_at:,} of an interrupted run")
    context.log.notes += result.record.details.get("warnings", [])
    if divided and not context.session.share.is_whole:
        units = None  # they are written of all shards
    elif divided and units is not None and context.session.writes and result.sums is not None:
        write_units(str(context.path(units)), result.sums)
    files = {"examples": examples or result.record.examples, "units": units}
    return context.recorded(key, replace(result, record=structs.replace(result.record, **files)))


@dataclass(frozen=True, repr=False)
class PerplexityResult(Result):
    """The result of `perplexity`. Values have a 95 % interval, `.low` to `.high` (over documents, or blocks of one
    stream; NoIntervalError if the text is too short for one)."""

    resumed_at: int = 0  # tokens that an interrupted run had already scored
    sums: LossAccumulator | None = None  # without the state

    @property
    def part(self) -> dict[str, Any] | None:
        """What the shares of a text are merged from."""
        return None if self.sums is None else self.sums.to_json()

    perplexity = MetricValue()
    """exp of the mean loss a token."""
    nll = MetricValue()
    """Mean negative log-likelihood, nats a token."""
    bits_per_byte = MetricValue(absent="{record.subject} holds token ids, no text: there are no bytes to divide by.")
    """Bits a byte of the original text. Raises AttributeError for a corpus of token ids."""
    tokens_per_second = MetricValue()

    @property
    def token_accuracy(self) -> dict[int, Value]:
        """Fraction of targets among the model's first k choices, by k."""
        return {k: self.record.metrics[f"token_accuracy_top{k}"] for k in HITS}

    @property
    def tokens(self) -> int:
        """The number of targets, each scored exactly once."""
        return self.record.cost.tokens or 0

    @property
    def seconds(self) -> float:
        return self.record.cost.seconds or 0.0

    @property
    def state_bytes(self) -> int:
        """The largest state in bytes."""
        return self.record.cost.state_bytes or 0

    @property
    def chunks(self) -> int:
        return int(self.record.details["chunks"])

    @property
    def chunk_loss(self) -> Series:
        """Mean loss of each chunk (of groups of chunks in a very long text), nats a token, by tokens read."""
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
        """Mean loss of the thousand targets up to each chosen position that was reached, nats a token."""
        series = self.record.series.get("loss_at")
        return {} if series is None else {int(at): self.record.metrics[name_of(int(at))] for at in series.x}

    @property
    def loss_slope(self) -> Value:
        """Least-squares slope of `loss_at`, nats a token per 1000 positions: negative while context helps.

        Raises AttributeError if fewer than two of the chosen positions were reached.
        """
        if "loss_slope" not in self.record.metrics:
            asked, missing = self.record.settings.get("positions", []), self.record.details.get("not_reached", [])
            raise AttributeError(
                f"a slope needs two positions. Asked for were {asked or 'none'}, and {self.record.subject} did not reach "
                f"{missing or 'none'} of them. Give positions that the text reaches: positions=(1000, 2000, 4000)."
            )
        return self.record.metrics["loss_slope"]

    @property
    def fast_weights(self) -> fast_weights.FastWeights | None:
        """The changes of the model's fast weights; None if it has none."""
        return fast_weights.found_in(self.record)

    @property
    def certificate(self) -> Certificate | None:
        """The certificate that allowed the text to be read so."""
        return self.record.certificate


def measure_perplexity(
    lm: Model,
    corpus: Corpus | str | Iterable[Any],
    *,
    policy: Policy | None = None,
    tokens: int | None = None,
    limit: int | None = None,
    as_stream: bool | None = None,
    positions: tuple[int, ...] = (),
    losses: str | Path | None = None,
    units: str | Path | None = None,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    key: str = "",
    share: Share = WHOLE,
) -> PerplexityResult:
    """Read a corpus and score every token of it once.

    corpus      a `Corpus`, the name of one, or token ids (tensor, array, list, iterator of arrays)
    policy      how to read it (see `engine.policy_for`); by default as the model declares
    tokens      read so many tokens of the stream (of each document, if read by document)
    limit       read so many documents
    as_stream   read one stream, or each document with a new state; by default as the corpus declares, and by document in the
                windows of lm_eval
    positions   measure the loss at these positions, for example (8000, 16000, 24000): means of the thousand targets up to each
    losses      write the loss of every target to this .npy file (float32, nats)
    units       write the sums of each document, or block of the stream, to this file of JSON lines (see `scoring._text_files`)
    checkpoints, key    save a checkpoint now and then, and resume from the last one
    share       of the documents, or of the windows of a stream, that are read

    If some fast weights do not change (`scoring._fast_weights`), `details["warnings"]` says so. If memory runs out, smaller
    chunks are read from the last saved point, or from the beginning, and a note says so; a text that can be read only once (an
    iterator) is given up. Raises StreamError, NotFiniteError, CorpusError and OutOfMemory.
    """
    source, engine = as_corpus(corpus), Engine(lm, policy)
    if wrong := [position for position in positions if not isinstance(position, int) or position < 1]:
        raise StreamError(f"positions holds {wrong}; a position is the number of tokens before a target, 1 or more.")
    by_document = reads_by_document(engine.policy, source, as_stream)
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    reading = TextReading(
        engine,
        source,
        by_document=by_document,
        tokens=tokens,
        limit=limit,
        positions=tuple(sorted(set(positions))),
        losses=losses,
        progress=progress,
        checkpoints=checkpoints,
        key=key,
        share=share,
    )
    resumed_at = reading.sums.tokens
    audit, sums = reading.to_the_end(), reading.sums
    if not sums.tokens and share.is_whole:
        raise nothing_to_score(source, sums.skipped)
    chosen = {"tokens": tokens, "limit": limit}
    record = record_of(engine, source, sums, chosen, audit, seconds=time.perf_counter() - reading.began)
    files = {"examples": losses and str(losses), "units": units and str(units)}
    if units is not None:
        write_units(units, sums)
    kept = replace(sums, state=None, beginning=Beginning())
    return PerplexityResult(structs.replace(record, **files), resumed_at, kept)


def merged(results: Sequence[PerplexityResult]) -> PerplexityResult:
    """One result of those of all shares of a text."""
    sums = LossAccumulator.merged([result.sums for result in results if result.sums is not None])
    record = merged_record_of([result.record for result in results], sums)
    return PerplexityResult(record, sum(result.resumed_at for result in results), sums)


def reads_by_document(policy: Policy, corpus: Corpus, as_stream: bool | None) -> bool:
    """Whether each document of a corpus is read with a new state."""
    rolling = policy.windows is not None and policy.windows.anchored
    return not ((corpus.as_stream and not rolling) if as_stream is None else as_stream)
