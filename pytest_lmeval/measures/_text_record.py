"""Describe in a record how a text was read, and all its metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msgspec import structs

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._tokens import notes_on
from pytest_lmeval.engine import Engine
from pytest_lmeval.engine._policy import chunk_of
from pytest_lmeval.measures._audit import spread_note
from pytest_lmeval.measures._merging import EMPTY, merged_record
from pytest_lmeval.measures._text_audit import TextAudit
from pytest_lmeval.models._identity import facts
from pytest_lmeval.records._measured import Cost, Record
from pytest_lmeval.scoring import _fast_weights as fast_weights
from pytest_lmeval.scoring._loss_accumulator import LossAccumulator
from pytest_lmeval.scoring._loss_metrics import above_floor, metrics_of, not_reached, series_of


def record_of(
    engine: Engine,
    corpus: Corpus,
    sums: LossAccumulator,
    chosen: dict[str, int | None],
    audit: TextAudit,
    *,
    seconds: float,
) -> Record:
    """The record of all metrics, and of how the corpus was read."""
    lm, policy = engine.lm, engine.policy
    windows, certificate = policy.windows, policy.certificate
    again = sums.beginning
    metrics = above_floor(metrics_of(sums, seconds=seconds - again.seconds), corpus.entropy) if sums.tokens else {}
    return with_counted_notes(
        Record(
            kind="perplexity",
            subject=str(corpus),
            lm=facts(lm),
            settings={
                "chunk_size": chunk_of(lm, engine.asked),
                "reading": "carried" if windows is None else "windows",
                "window": None if windows is None else windows.size,
                "overlap": 0 if windows is None else windows.overlap,
                **({"rolling": True} if windows is not None and windows.anchored else {}),
                **({"invariant": True} if policy.invariant else {}),
                "by_document": sums.by_document,
                **chosen,
                "tokenizer": None if corpus.tokenized else getattr(lm.tokenizer, "name", type(lm.tokenizer).__name__),
                "unit": unit_of(sums),
                "data": corpus.fingerprint,
                **({"positions": list(sums.positions)} if sums.positions else {}),
                **({"special_tokens": True} if corpus.special_tokens else {}),
            },
            details={
                "why": "the state is carried" if windows is None else windows.why,
                "chunks": sums.chunks_seen,
                "documents": len(sums.units) if sums.by_document else None,
                "audit_seconds": again.seconds,
                **({"skipped": sums.skipped} if sums.skipped else {}),
                **({"special_tokens": sums.special_tokens} if sums.special_tokens else {}),
                **({"not_reached": not_reached(sums)} if sums.positions else {}),
                **(fast_weights.details_of(sums.fast_weights, lm, sums.tokens) if sums.fast_weights else {}),
            },
            notes=[
                *([] if windows is None else [str(windows)]),
                *([engine.less] if engine.less else []),
                *(() if policy.carry else policy.withheld[:1]),  # nothing is shared or batched in a text
            ],
            example="document" if sums.by_document else "block",
            metrics=metrics,
            cost=Cost(
                seconds=seconds,
                tokens=sums.tokens,
                peak_bytes=max(again.peak_bytes, torch.cuda.max_memory_allocated(lm.device))
                if lm.device.type == "cuda"
                else None,
                state_bytes=sums.peak_state_bytes,
            ),
            series=series_of(sums, metrics, carried=windows is None) if sums.tokens else {},
            not_measured=None if sums.tokens else EMPTY,
            certificate=None
            if certificate is None
            else structs.replace(certificate, chunking_used=policy.reading, audit=audit.result),
        )
    )


def with_counted_notes(record: Record) -> Record:
    """The record with the notes that its counts decide, after the others."""
    return structs.replace(record, notes=[*record.notes, *counted_notes(record)])


def counted_notes(record: Record) -> list[str]:
    """The notes that the counts of a record decide."""
    details = record.details
    documents = (details["documents"] or 0) if record.settings["by_document"] else 1
    special = "special_tokens" in record.settings
    counts = documents, details.get("skipped", 0), details.get("special_tokens", 0)
    return [*notes_on(*counts, read=special), *spread_note(record)]


def merged(records: Sequence[Record], sums: LossAccumulator) -> Record:
    """The record of a text of which each record is about a share, whose merged sums these are."""
    first = merged_record(records, counted_notes, sums=("chunks", "skipped"))
    if not sums.tokens:
        return first
    entropy = next((record.metrics["entropy_floor"] for record in records if "entropy_floor" in record.metrics), None)
    seconds = (first.cost.seconds or 0.0) - first.details["audit_seconds"]
    metrics = above_floor(metrics_of(sums, seconds=seconds), entropy)
    details = {
        **first.details,
        "documents": len(sums.units) if sums.by_document else None,
        **({"special_tokens": sums.special_tokens} if sums.special_tokens else {}),
        **({"not_reached": not_reached(sums)} if sums.positions else {}),
    }
    settings = {**first.settings, "unit": unit_of(sums)}
    series = series_of(sums, metrics, carried=False)
    whole = structs.replace(first, metrics=metrics, details=details, settings=settings, series=series, not_measured=None)
    return with_counted_notes(whole)


def unit_of(sums: LossAccumulator) -> str:
    return "document" if sums.by_document else f"block of {sums.block} tokens"
