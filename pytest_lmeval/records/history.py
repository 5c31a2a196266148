"""What the runs in a folder have measured so far: a JSON line for each number of each run, so that one sees how it moves.

    {"run", "started", "commit", "test", "lm", "kind", "subject", "metric", "value", "low", "high", "unit"}

A run adds its lines in one piece when it ends. A line that was cut short is left out of what is read, and that is told.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "history.jsonl"
TEXTS = ("run", "started", "commit", "test", "lm", "kind", "subject", "metric", "unit")


@dataclass(frozen=True)
class Statistics:
    """One number over the runs."""

    count: int
    mean: float
    min: float
    max: float
    last: float


def append(folder: Path, document: dict[str, Any]) -> None:
    """Add a run, given as the content of its `metrics.json`."""
    lines = [json.dumps(line) + "\n" for record in document["records"] for line in _lines(document, record)]
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def _lines(document: dict[str, Any], record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    about = {
        "run": document["run"]["id"],
        "started": document["run"]["started"],
        "commit": document["environment"]["commit"],
        "test": record["test"],
        "lm": record["lm"]["spec"],
        "kind": record["kind"],
        "subject": record["subject"],
    }
    for name, metric in record["metrics"].items():
        yield {**about, "metric": name, **{key: metric[key] for key in ("value", "low", "high", "unit")}}


def read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of all runs in this folder that hold a value and a time, and what is to be said of the others."""
    try:
        raw = (Path(folder) / NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], []
    lines, broken = [], 0
    for text in filter(str.strip, raw.splitlines()):
        line = _line(text)
        if line is None:
            broken += 1
        else:
            lines.append(line)
    return lines, [f"{broken} lines of {NAME} cannot be read, and are left out"] if broken else []


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not _finite(line.get("value")) or (started := _time(line.get("started"))) is None:
        return None
    line["started"] = started
    if isinstance(line.get("lm"), dict):
        line["lm"] = line["lm"].get("spec")
    bounds = {bound: line.get(bound) if _finite(line.get(bound)) else None for bound in ("low", "high")}
    return {**{name: str(line.get(name) or "") for name in TEXTS}, "value": line["value"], **bounds}


def _time(started: Any) -> str | None:
    """The time of a run, of ISO's form or in seconds since 1970, in ISO's form."""
    try:
        if isinstance(started, str):
            return datetime.datetime.fromisoformat(started.replace("Z", "+00:00")).isoformat()
        return datetime.datetime.fromtimestamp(started, datetime.timezone.utc).isoformat(timespec="seconds")
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def statistics(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str, str], Statistics]:
    """Of each number, by (test, lm, subject, metric): how often it was measured, its mean, least, greatest and last value."""
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for line in lines:
        values.setdefault((line["test"], line["lm"], line["subject"], line["metric"]), []).append(line["value"])
    return {key: Statistics(len(all_), sum(all_) / len(all_), min(all_), max(all_), all_[-1]) for key, all_ in values.items()}
