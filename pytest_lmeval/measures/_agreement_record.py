"""Describe in a record how closely two models agree, and merge what several processes measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs

from pytest_lmeval.data._tokens import notes_on
from pytest_lmeval.measures._agreement_sums import TOKENS, Sums, metrics_of, series_of
from pytest_lmeval.measures._merging import EMPTY, merged_record
from pytest_lmeval.measures._mismatch import Differences
from pytest_lmeval.records._measured import Cost, Record


def with_numbers(record: Record, sums: Sums, differences: Differences) -> Record:
    """The record with all that the sums and the differences of the losses say."""
    if not sums.units:
        return structs.replace(record, details={**record.details, "explanation": []}, not_measured=EMPTY)
    record = structs.replace(
        record,
        details={**record.details, **differences.details()},
        metrics=metrics_of(sums),
        series=series_of(sums),
        cost=structs.replace(record.cost, tokens=int(sums.total[TOKENS])),
        not_measured=None,
    )
    return structs.replace(record, notes=[*record.notes, *counted_notes(record)])


def counted_notes(record: Record) -> list[str]:
    """The notes that the counts of a record, and its explanation, decide."""
    details, special = record.details, bool(record.settings.get("special_tokens"))
    documents = 0 if record.cost.tokens is None else details.get("documents", 1)
    counted = notes_on(documents, details.get("skipped", 0), details.get("special_tokens", 0), read=special)
    return [*counted, *details.get("explanation", [])]


def merged(records: Sequence[Record], parts: Sequence[Mapping[str, Any]]) -> Record:
    """The record of an agreement of which each record is about a share, from what each share added up."""
    by_document = records[0].settings["by_document"]  # of a stream, each share counts all of it
    first = merged_record(records, counted_notes, ("skipped", "special_tokens", "documents") if by_document else ())
    sums = Sums.merged([Sums.from_json(part["sums"]) for part in parts])
    differences = Differences.merged([Differences.from_json(part["differences"]) for part in parts])
    cost = Cost(seconds=first.cost.seconds, tokens=first.cost.tokens)
    return with_numbers(structs.replace(first, cost=cost), sums, differences)
