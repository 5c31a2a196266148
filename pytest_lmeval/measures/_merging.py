"""Merge the records of what several processes measured of one call, each a share of its examples.

What a kind of record adds up to is computed anew by its own module, from the examples or the sums of all shares, with the same
functions as in one process; here is what all kinds have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import structs

from pytest_lmeval.errors import MergeError
from pytest_lmeval.records._certificate import Audit, Certificate
from pytest_lmeval.records._measured import Cost, Record

OF_SHARES = ("prompts", "unit")  # settings that each share has its own of

EMPTY = "no example of it falls into this share"


def merged_record(records: Sequence[Record], counted_notes: Callable[[Record], list[str]], sums: Sequence[str] = ()) -> Record:
    """A record of all shares, without metrics, series and the notes that its counts decide.

    counted_notes  the notes among those of a record that its counts decide
    sums           details that add up

    Its seconds are those of the share that took longest. Raises MergeError for records of another model or other settings.
    """
    for record in records[1:]:
        check_same(records[0], record)
    base = next((record for record in records if record.metrics), records[0])
    details = {**base.details, "audit_seconds": max(record.details.get("audit_seconds", 0.0) for record in records)}
    for name in sums:
        if any(name in record.details for record in records):
            details[name] = sum(record.details.get(name, 0) for record in records)
    kept = (note for record in records for note in record.notes if note not in counted_notes(record))
    return structs.replace(
        base,
        details=details,
        notes=list(dict.fromkeys(kept)),
        metrics={},
        series={},
        cost=_cost([record.cost for record in records]),
        certificate=_certificate([record.certificate for record in records]),
        examples=None,
        units=None,
    )


def check_same(one: Record, other: Record) -> None:
    """Raise MergeError if two records are not about shares of the same."""
    properties: tuple[tuple[str, Callable[[Record], Any]], ...] = (
        ("measure other things", lambda record: (record.test, record.kind, record.subject)),
        ("are of different models", lambda record: (record.lm.spec, record.lm.fingerprint, record.lm.dtype)),
        ("were measured with different settings", _settings),
    )
    for what, of in properties:
        if (left := of(one)) != (right := of(other)):
            if isinstance(left, dict):
                names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
                left, right = ({name: side.get(name) for name in names} for side in (left, right))
            raise MergeError(f"{one.test or one.subject}: the shares {what}: {left} and {right}. They are not merged.")


def _settings(record: Record) -> dict[str, object]:
    return {name: value for name, value in record.settings.items() if name not in OF_SHARES}


def _cost(costs: Sequence[Cost]) -> Cost:
    def of(name: str, combine: Callable[[list[Any]], Any]) -> Any:
        known = [value for cost in costs if (value := getattr(cost, name)) is not None]
        return combine(known) if known else None

    longest = {name: of(name, max) for name in ("seconds", "peak_bytes", "state_bytes")}
    return Cost(**longest, tokens=of("tokens", sum), flops=of("flops", sum))


def _certificate(certificates: Sequence[Certificate | None]) -> Certificate | None:
    """The certificate of the first, with the audits of all; one that claims less comes first."""
    known = [one for one in certificates if one is not None]
    if not known:
        return None
    least = min(known, key=lambda one: len(one.with_status("kept")))
    return structs.replace(least, audit=_audit([one.audit for one in known if one.audit is not None]))


def _audit(audits: Sequence[Audit]) -> Audit | None:
    if not audits:
        return None
    most = {name: max(getattr(audit, name) for audit in audits) for name in ("tokens", "difference", "share", "full")}
    return Audit(**most, **{name: sum(getattr(audit, name) for audit in audits) for name in ("questions", "answers")})
