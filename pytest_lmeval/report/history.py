"""Reading `history.jsonl`, one line a run and metric, as far as it can be read."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

TEXTS = ("run", "started", "commit", "test", "lm", "kind", "subject", "metric")


def read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of the folder's history that hold a value and a time, and what is to be said of the others."""
    try:
        raw = (folder / "history.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], []
    lines, broken = [], 0
    for text in filter(str.strip, raw.splitlines()):
        line = _line(text)
        if line is None:
            broken += 1
        else:
            lines.append(line)
    return lines, [f"{broken} lines of history.jsonl cannot be read and are not drawn"] if broken else []


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
