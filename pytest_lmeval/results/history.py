"""What the runs in a folder have measured so far: a JSON line for each number of each run, so that one sees how it moves.

    {"run", "started", "commit", "test", "lm", "kind", "subject", "metric", "value", "low", "high", "unit"}

A run adds its lines in one piece when it ends. A line that was cut short is left out of what is read, and that is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_lmeval.results.journal import warn

NAME = "history.jsonl"


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


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of all runs in this folder, in their order; none where there is no history."""
    path = Path(folder) / NAME
    if not path.exists():
        return []
    found, spoiled = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            spoiled += 1
    if spoiled:
        warn(f"{path}: {spoiled} line(s) cannot be read, and are left out of the history.")
    return found


def statistics(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str, str], Statistics]:
    """Of each number, by (test, lm, subject, metric): how often it was measured, its mean, least, greatest and last value."""
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for line in lines:
        values.setdefault((line["test"], line["lm"], line["subject"], line["metric"]), []).append(line["value"])
    return {key: Statistics(len(all_), sum(all_) / len(all_), min(all_), max(all_), all_[-1]) for key, all_ in values.items()}
