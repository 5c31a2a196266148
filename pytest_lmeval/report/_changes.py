"""What became of the numbers since the baseline: a row for each metric that a gate has judged, the worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pytest_lmeval.records._comparison import ORDER, Comparison, Flip, GateVerdict
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.report._comparison_notes import remarks
from pytest_lmeval.report._words import number


@dataclass(frozen=True)
class Change:
    """A metric against its baseline, as text.

    remarks  what the reader should know of it
    basis    what the verdict rests on: margin, probability, test
    flips    examples that changed: id, before, after, output, target
    changed  how many there are of them in all
    """

    test: str
    lm: str
    subject: str
    metric: str
    verdict: GateVerdict
    base: str
    new: str
    difference: str
    interval: str
    remarks: str
    basis: str
    flips: list[tuple[str, ...]]
    changed: int

    @property
    def is_quiet(self) -> bool:
        """Whether there is nothing to say of it."""
        return self.verdict == "identical" and not self.remarks


def changes(records: Sequence[Record]) -> list[Change]:
    """What the gates found of all records."""
    found = [_change(record, name, row) for record in records for name, row in (record.gate or {}).items()]
    return sorted(found, key=lambda change: ORDER.index(change.verdict))


def counted(verdicts: Iterable[GateVerdict]) -> str:
    """How many there are of each, in words.

    >>> counted(["same", "worse", "same"])
    '1 worse, 2 same'
    """
    counts = Counter(verdicts)
    return ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in ORDER if verdict in counts)


def differences(records: Sequence[Record]) -> list[tuple[str, str]]:
    """For each test the settings that differ between the two runs, said once for all of its metrics."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for row in (record.gate or {}).values():
            found.setdefault(record.test, {}).update(dict.fromkeys(row.differences))
    return [(test, ", ".join(said)) for test, said in found.items() if said]


def _change(record: Record, name: str, row: Comparison) -> Change:
    value = record.metrics.get(name)
    declared = metric(name, value)
    unit = declared.unit if value is None else value.unit
    return Change(
        test=record.test,
        lm=record.lm.spec,
        subject=record.subject,
        metric=declared.label,
        verdict=row.verdict,
        base=_text(row.base, unit),
        new=_text(value if row.new is None else row.new, unit),
        difference=_signed(row.difference, unit),
        interval="" if row.low is None or row.high is None else f"{_signed(row.low, unit)} to {_signed(row.high, unit)}",
        remarks="; ".join(_remarks(row, record.example)),
        basis=", ".join(_basis(row)),
        flips=[_flip(flip) for flip in row.flipped],
        changed=max(len(row.flipped), (row.lost or 0) + (row.won or 0)),
    )


def _flip(flip: Flip) -> tuple[str, ...]:
    return flip.id, number(flip.before), number(flip.after), flip.output or "", flip.target or ""


def _basis(row: Comparison) -> Iterator[str]:
    if row.margin is not None:
        yield f"margin {_text(row.margin)}"
    if row.p is not None:
        yield f"p {number(row.p)}"
    if row.test:
        yield row.test


def _remarks(row: Comparison, example: str) -> Iterator[str]:
    yield from remarks(row, example)
    if row.lost or row.won:
        yield f"{row.lost or 0:,} lost, {row.won or 0:,} won"


def _text(value: float | str | None, unit: str = "") -> str:
    return "" if value is None else value if isinstance(value, str) else number(value, unit)


def _signed(value: float | None, unit: str) -> str:
    """A difference; its unit is that of the value beside it, but bytes need theirs."""
    if not value:
        return _text(value)
    return ("+" if value > 0 else "-") + number(abs(value), unit if unit == "bytes" else "")
