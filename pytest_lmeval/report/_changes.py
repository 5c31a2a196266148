"""Format gate results: a row for each judged metric, worst first, and notes on how its numbers were compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pytest_lmeval.records._comparison import ORDER, Comparison, GateVerdict
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.report._words import number, several


@dataclass(frozen=True)
class Change:
    """A metric against its baseline, as text.

    notes    what the reader should know about the comparison
    basis    what the verdict is based on: margin, probability, test
    flips    first examples that changed: id, before, after, output, target
    changed  number of examples that changed
    """

    record: Record
    metric: str
    verdict: GateVerdict
    base: str
    new: str
    difference: str
    interval: str
    notes: str
    basis: str
    flips: list[tuple[str, ...]]
    changed: int

    @property
    def is_unchanged(self) -> bool:
        """Nothing changed and there is no note."""
        return self.verdict == "identical" and not self.notes


def changes(records: Sequence[Record]) -> list[Change]:
    """Format the gate results of all records."""
    found = [_change(record, name, row) for record in records for name, row in (record.gate or {}).items()]
    return sorted(found, key=lambda change: ORDER.index(change.verdict))


def counted(verdicts: Iterable[GateVerdict]) -> str:
    """Count the verdicts, in words.

    >>> counted(["same", "worse", "same"])
    '1 worse, 2 same'
    """
    counts = Counter(verdicts)
    return ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in ORDER if verdict in counts)


def differences(records: Sequence[Record]) -> list[tuple[str, str]]:
    """For each test the settings that differ between the two runs."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for row in (record.gate or {}).values():
            found.setdefault(record.test, {}).update(dict.fromkeys(row.differences))
    return [(test, ", ".join(settings)) for test, settings in found.items() if settings]


def _change(record: Record, name: str, row: Comparison) -> Change:
    value = record.metrics.get(name)
    declared = metric(name, value)
    unit = declared.unit if value is None else value.unit
    return Change(
        record=record,
        metric=declared.label,
        verdict=row.verdict,
        base=_text(row.base, unit),
        new=_text(value if row.new is None else row.new, unit),
        difference=_signed(row.difference, unit),
        interval="" if row.low is None or row.high is None else f"{_signed(row.low, unit)} to {_signed(row.high, unit)}",
        notes="; ".join(_notes(row, record.example)),
        basis=", ".join(_basis(row)),
        flips=[(one.id, number(one.before), number(one.after), one.output or "", one.target or "") for one in row.flipped],
        changed=max(len(row.flipped), (row.lost or 0) + (row.won or 0)),
    )


def _basis(row: Comparison) -> Iterator[str]:
    if row.margin is not None:
        yield f"margin {_text(row.margin)}"
    if row.p is not None:
        yield f"p {number(row.p)}"
    if row.test:
        yield row.test


def comparison_notes(found: Comparison, example: str) -> Iterator[str]:
    """Why it was not paired, how many examples one run alone has, and which loss would have been detected.

    example  name of one example (`Record.example`)

    The terminal, failures and pages use the same words.
    """
    example = "question" if found.answers else example
    if found.note:
        yield found.note
    if found.only_base or found.only_new:
        alone = f"{found.only_base:,} only in the baseline, {found.only_new:,} only here"
        yield f"on {several(found.n or 0, example)} of both runs; {alone}"
    if found.noise is not None and found.answers is not None and found.verdict != "identical":
        times = " and ".join(f"{count:g}" for count in found.answers)
        yield f"questions answered {times} times: chance alone makes {number(found.noise)} (one standard deviation)"
    if found.verdict == "unclear" and found.detectable is not None:
        yield f"a loss of {number(abs(found.detectable))} would have been found (with a probability of 80 %)"
    if found.verdict == "unclear" and found.needed and not _is_certain(found) and isinstance(found.margin, int | float):
        more = f", or {found.answers_needed:,} answers to each of these in both runs," if found.answers_needed else ""
        needed = several(found.needed, example)
        yield f"if nothing was lost, {needed}{more} would show it ({number(found.margin)} is allowed)"


def _is_certain(found: Comparison) -> bool:
    """Whether something was lost for certain: the interval excludes that nothing was."""
    if found.low is None or found.high is None or found.higher_is_better is None:
        return False
    return found.high < 0 if found.higher_is_better else found.low > 0


def _notes(row: Comparison, example: str) -> Iterator[str]:
    yield from comparison_notes(row, example)
    if row.lost or row.won:
        yield f"{row.lost or 0:,} lost, {row.won or 0:,} won"


def _text(value: float | str | None, unit: str = "") -> str:
    return "" if value is None else value if isinstance(value, str) else number(value, unit)


def _signed(value: float | None, unit: str) -> str:
    """A difference, without the unit of the value beside it, except bytes."""
    if not value:
        return _text(value)
    return ("+" if value > 0 else "-") + number(abs(value), unit if unit == "bytes" else "")
