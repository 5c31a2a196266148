"""What a baseline says of a record: the numbers that mean the same on another machine, and what they were had with."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from pytest_lmeval.gates.margins import READINGS, Margins, is_cost, is_speed
from pytest_lmeval.gates.scores import rounded

SETTINGS = (
    *("reading", "window", "overlap", "rolling", "by_document", "tokens", "limit", "unit", "tokenizer"),
    *("style", "version", "shots", "fewshot", "truncate", "prompts", "rate_is"),
    *("steps", "batch_size", "seq_len", "lr", "seed"),
)  # those that decide what was asked; how fast it went and in which chunks it was read does not
COSTS = ("flops", "state_bytes", "peak_bytes")
UNTOLD = (  # of a whole process, or of a device that others use too: other in every run
    *("peak_memory", "peak_memory_growth", "peak_bytes", "growth_bytes", "allocated_bytes", "reserved_bytes"),
)
TIMED = ("latency", "throughput", "streaming")  # their FLOPs are those of all runs, as many as the clock wanted


def entry_of(record: dict[str, Any]) -> dict[str, Any]:
    """The entry of a record: its metrics but for times, its costs but for the seconds, its verdict, its model, its settings."""
    probed = record["kind"] == "equivalence"  # how many cases it tried is a question of time: only the verdict is kept
    kept = {name: metric for name, metric in record["metrics"].items() if not probed and _is_kept(name, metric["unit"])}
    metrics = {name: _metric(metric) for name, metric in kept.items()}
    on_gpu = str(record["lm"].get("device", "")).startswith("cuda")  # elsewhere, peak_bytes are those of the whole process
    left = {"flops": record["kind"] not in TIMED, "peak_bytes": on_gpu}
    costs = {name: record["cost"].get(name) for name in COSTS if not probed and left.get(name, True)}
    verdict = (record.get("certificate") or {}).get("verdict") if probed else None
    return {
        "lm": {name: portable(str(record["lm"].get(name))) for name in ("spec", "dtype", "device", "fingerprint")},
        "settings": {name: _short(record["settings"][name]) for name in SETTINGS if record["settings"].get(name) is not None},
        "metrics": metrics,
        "costs": {name: rounded(cost) for name, cost in costs.items() if cost is not None},
        "headline": headline(record["kind"], list(metrics)),
        "verdict": verdict,
    }


def headline(kind: str, metrics: list[str]) -> str | None:
    """The metric that is gated where the marker names none: one a record, since each more makes the others less certain."""
    if kind == "perplexity":
        return next((name for name in READINGS if name in metrics), None)
    return metrics[0] if kind == "task" and metrics else None


def gated(entry: dict[str, Any], margins: Margins) -> list[str]:
    """The metrics of an entry that are judged with chance in mind: its headline, and what the marker names."""
    if margins.off:
        return []
    named = [name for name in margins.given if name in entry["metrics"] and not is_cost(name)]
    first = entry["headline"]
    told = first is None or first in named or (first in READINGS and any(name in READINGS for name in named))
    return [name for name in (named if told else [first, *named]) if margins.of(name) is not None]


def names_of(records: list[dict[str, Any]]) -> list[str]:
    """What each record of a test is called in a baseline: its kind and subject, numbered where several have the same.

    >>> names_of([{"kind": "task", "subject": "boolq, 0-shot"}] * 2)
    ['task boolq, 0-shot', 'task boolq, 0-shot #2']
    """
    seen: Counter[str] = Counter()
    names = []
    for record in records:
        name = f"{record['kind']} {portable(record['subject'])}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return names


def portable(text: str) -> str:
    """Without the folders of an absolute path: they are those of one machine.

    >>> portable("text:/home/me/notes.txt[test]"), portable("OWNER/NAME[test]")
    ('text:notes.txt[test]', 'OWNER/NAME[test]')
    """
    return re.sub(r"(^|[:\s])(?:[A-Za-z]:)?[/\\](?:[^/\\\[\]#]+[/\\])*", r"\1", text)


def differs(entry: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What the two entries were not had alike with, in words: model, precision, place, settings."""
    pairs = [(f"model's {key}" if key == "fingerprint" else key, entry["lm"].get(key), new["lm"].get(key)) for key in new["lm"]]
    names = dict.fromkeys([*entry["settings"], *new["settings"]])
    pairs += [(name, entry["settings"].get(name), new["settings"].get(name)) for name in names]
    return [f"{name} was {old}, is {now}" for name, old, now in pairs if old != now]


def _short(value: Any) -> Any:
    """Of a hash, as much as tells it apart."""
    return value[:16] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value) else value


def _is_kept(name: str, unit: str) -> bool:
    return not is_speed(name, unit) and name not in UNTOLD


def _metric(metric: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: rounded(metric[name]) for name in ("value", "low", "high", "n")}
    return {**numbers, "unit": metric["unit"], "higher_is_better": metric["higher_is_better"]}
