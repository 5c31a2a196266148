"""What became of the numbers since the baseline: a row for each metric that a gate has judged, the worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.report.remarks import noun, remarks
from pytest_lmeval.report.words import number

ORDER = ("worse", "missing", "unclear", "better", "new", "same", "identical", "not judged")


@dataclass(frozen=True)
class Change:
    """A metric against its baseline, as text.

    remarks  what the reader should know of it
    basis    what the verdict rests on: margin, probability, test
    flips    examples that changed: id, before, after, answer, target
    changed  how many there are of them in all
    """

    test: str
    lm: str
    subject: str
    metric: str
    verdict: str
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


def changes(records: list[dict[str, Any]]) -> list[Change]:
    """The gate's verdicts of all records. A field that a verdict lacks is empty."""
    found = [
        _change(record, name, verdict)
        for record in records
        for name, verdict in (record.get("gate") or {}).items()
        if isinstance(verdict, dict)
    ]
    return sorted(found, key=lambda change: ORDER.index(change.verdict) if change.verdict in ORDER else len(ORDER))


def counted(verdicts: Iterable[str]) -> str:
    """How many there are of each, in words.

    >>> counted(["same", "worse", "same"])
    '1 worse, 2 same'
    """
    counts = Counter(verdicts)
    known = [verdict for verdict in ORDER if verdict in counts]
    return ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in (*known, *sorted(set(counts) - set(ORDER))))


def _change(record: dict[str, Any], name: str, verdict: dict[str, Any]) -> Change:
    metric = record["metrics"].get(name)
    unit = metric["unit"] if metric else "bytes" if name.endswith("bytes") else ""
    new = verdict.get("new", metric and metric["value"])
    low, high, flipped = verdict.get("low"), verdict.get("high"), verdict.get("flipped")
    flips = [_flip(flip) for flip in flipped if isinstance(flip, dict)] if isinstance(flipped, list) else []
    return Change(
        test=record["test"],
        lm=record["lm"]["spec"],
        subject=record["subject"],
        metric=name.replace("_", " "),
        verdict=str(verdict.get("verdict") or "unknown"),
        base=_text(verdict.get("base"), unit),
        new=_text(new, unit),
        difference=_signed(verdict.get("difference"), unit),
        interval="" if low is None or high is None else f"{_signed(low, unit)} to {_signed(high, unit)}",
        remarks="; ".join(_remarks(verdict, noun(record))),
        basis=", ".join(_basis(verdict)),
        flips=flips,
        changed=max(len(flips), (verdict.get("lost") or 0) + (verdict.get("won") or 0)),
    )


def _flip(flip: dict[str, Any]) -> tuple[str, ...]:
    return tuple(_text(flip.get(name)) for name in ("id", "before", "after", "answer", "target"))


def _basis(verdict: dict[str, Any]) -> Iterable[str]:
    if verdict.get("margin") is not None:
        yield f"margin {_text(verdict['margin'])}"
    if verdict.get("p") is not None:
        yield f"p {_text(verdict['p'])}"
    if verdict.get("test"):
        yield str(verdict["test"])


def _remarks(verdict: dict[str, Any], example: str) -> Iterable[str]:
    yield from remarks(verdict, example)
    if verdict.get("lost") or verdict.get("won"):
        yield f"{_text(verdict.get('lost') or 0)} lost, {_text(verdict.get('won') or 0)} won"


def unlike(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """For each test what it was not had alike with in the two runs, said once for all of its metrics."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for verdict in (record.get("gate") or {}).values():
            found.setdefault(record["test"], {}).update(dict.fromkeys(map(str, verdict.get("unlike") or ())))
    return [(test, ", ".join(said)) for test, said in found.items() if said]


def _text(value: Any, unit: str = "") -> str:
    return "" if value is None else number(value, unit) if isinstance(value, int | float) else str(value)


def _signed(value: Any, unit: str) -> str:
    """A difference; its unit is that of the value beside it, but bytes need theirs."""
    if not isinstance(value, int | float) or not value:
        return _text(value)
    return ("+" if value > 0 else "-") + number(abs(value), unit if unit == "bytes" else "")
