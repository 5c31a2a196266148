"""What became of the numbers since the baseline: a row for each metric that a gate has judged, the worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.report.words import number

ORDER = ("worse", "missing", "unclear", "better", "new", "same", "identical", "not judged")


@dataclass(frozen=True)
class Change:
    """A metric against its baseline, as text.

    meaning  what the verdict rests on, in words
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
    meaning: str
    flips: list[tuple[str, ...]]
    changed: int


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
        meaning="; ".join(_meaning(verdict)),
        flips=flips,
        changed=max(len(flips), (verdict.get("lost") or 0) + (verdict.get("won") or 0)),
    )


def _flip(flip: dict[str, Any]) -> tuple[str, ...]:
    return tuple(_text(flip.get(name)) for name in ("id", "before", "after", "answer", "target"))


def _meaning(verdict: dict[str, Any]) -> Iterable[str]:
    if verdict.get("margin") is not None:
        yield f"margin {_text(verdict['margin'])}"
    if verdict.get("p") is not None:
        yield f"p {_text(verdict['p'])}"
    if verdict.get("verdict") == "unclear":
        if verdict.get("detectable") is not None:
            yield f"a difference of {_text(verdict['detectable'])} could have been seen"
        if verdict.get("needed") is not None:
            yield f"{_text(verdict['needed'])} examples would settle it"
    if verdict.get("lost") or verdict.get("won"):
        yield f"{_text(verdict.get('lost') or 0)} lost, {_text(verdict.get('won') or 0)} won"
    if note := verdict.get("note"):
        yield str(note)
    if unlike := verdict.get("unlike"):
        yield f"not had alike: {', '.join(map(str, unlike))}"


def _text(value: Any, unit: str = "") -> str:
    return "" if value is None else number(value, unit) if isinstance(value, int | float) else str(value)


def _signed(value: Any, unit: str) -> str:
    """A difference; its unit is that of the value beside it, but bytes need theirs."""
    if not isinstance(value, int | float) or not value:
        return _text(value)
    return ("+" if value > 0 else "-") + number(abs(value), unit if unit == "bytes" else "")
