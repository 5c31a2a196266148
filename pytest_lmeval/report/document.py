"""Reading a `metrics.json` back: what it must have, what is filled in where it lacks something, and what is said of that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pytest_lmeval.results.record import SCHEMA

LM = {"spec": "unknown model", "parameters": None, "bytes": None, "dtype": "", "device": "", "fingerprint": ""}
RUN = {"id": "", "started": "", "seconds": None, "command": "", "exit_status": None}
ENVIRONMENT: dict[str, Any] = {
    "python": "",
    "torch": "",
    "device": "",
    "cpu": "",
    "threads": None,
    "commit": None,
    "dirty": None,
}
RECORD = {"test": "", "kind": "custom", "subject": "", "certificate": None, "examples": None, "outcome": ""}
COST = ("seconds", "tokens", "flops", "peak_bytes", "state_bytes")
LAW = {"kept": True, "cases": 0, "planned": 0, "worst_ratio": None, "counterexample": None, "unavailable": None}
ITEMS: dict[str, dict[str, Any]] = {
    "skipped": {"test": "", "reason": ""},
    "failures": {"test": "", "message": "", "file": None, "line": None},
    "sections": {"title": "", "text": "", "columns": [], "rows": []},
}
STATE = {"bytes": 0, "tokens": 0, "bytes_per_token": 0.0, "dtypes": []}
LISTS = (*ITEMS, "problems")


class DocumentError(ValueError):
    """A file that is no metrics document of this schema; the message says what it is and what to do."""


def load(path: Path) -> dict[str, Any]:
    """The document of a file, or of the `metrics.json` in a folder, completed (see `complete`).

    Raises DocumentError where the file is missing, truncated, something else, or of another schema version.
    """
    file = path / "metrics.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DocumentError(
            f"{file} cannot be read ({error.strerror or error}). A run writes metrics.json into the folder of --lmeval-dir, "
            "by default .lmeval."
        ) from error
    except ValueError as error:
        raise DocumentError(
            f"{file} is not whole JSON ({error}), so none of its numbers can be trusted: it was cut off or edited. A "
            "journal.jsonl beside it holds every result that was finished; running the tests again writes the file anew."
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("records"), list):
        raise DocumentError(f"{file} holds no list of records, so it is no metrics.json of pytest-lmeval.")
    if document.get("schema") != SCHEMA:
        raise DocumentError(
            f"{file} is of schema version {document.get('schema')!r}, and this pytest-lmeval reads version {SCHEMA}: what its "
            "fields mean is not known here. Use the version of pytest-lmeval that wrote it, or run the tests again."
        )
    return complete(document)


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """A copy in which every field of the schema is there. What had to be left out stands in its `problems`."""
    problems: list[str] = list(document.get("problems") or [])
    return {
        **document,
        **{
            name: [_filled(fields, item) for item in document.get(name) or [] if isinstance(item, dict)]
            for name, fields in ITEMS.items()
        },
        "schema": SCHEMA,
        "run": _filled(RUN, document.get("run")),
        "environment": _filled({**ENVIRONMENT, "packages": {}}, document.get("environment")),
        "records": [
            _record(record, f"record {number}", problems)
            for number, record in enumerate(document["records"], start=1)
            if _is_object(record, f"record {number}", problems)
        ],
        "problems": problems,
    }


def _filled(defaults: dict[str, Any], given: Any) -> dict[str, Any]:
    """What is given, and the defaults for what is missing or null."""
    kept = given.items() if isinstance(given, dict) else ()
    return {**defaults, **{name: value for name, value in kept if value is not None or defaults.get(name) is None}}


def _is_object(record: Any, what: str, problems: list[str]) -> bool:
    if not isinstance(record, dict):
        problems.append(f"{what} is {type(record).__name__}, no object, and was left out")
    return isinstance(record, dict)


def _record(record: dict[str, Any], what: str, problems: list[str]) -> dict[str, Any]:
    kept = {}
    which = f"{what} ({record.get('test') or record.get('subject') or 'nameless'})"
    for name, metric in (record.get("metrics") or {}).items():
        if isinstance(metric, dict) and _finite(metric.get("value")):
            bounds = {bound: metric.get(bound) if _finite(metric.get(bound)) else None for bound in ("low", "high")}
            if None in bounds.values():
                bounds = dict.fromkeys(bounds)
            kept[name] = _filled({"unit": "", "n": None, "higher_is_better": None}, metric) | bounds
        else:
            problems.append(f"{which}: {name} has no value, and was left out")
    series = {}
    for name, curve in (record.get("series") or {}).items():
        if _is_curve(curve):
            series[name] = _filled({"x_unit": "", "y_unit": ""}, curve)
        else:
            problems.append(f"{which}: the series {name} is no curve, and was left out")
    certificate = record.get("certificate")
    return {
        **_filled(RECORD, record),
        "lm": _filled(LM, record.get("lm")),
        "settings": record.get("settings") or {},
        "metrics": kept,
        "cost": _filled(dict.fromkeys(COST), record.get("cost")),
        "series": series,
        "certificate": _certificate(certificate) if isinstance(certificate, dict) else None,
    }


def _certificate(certificate: dict[str, Any]) -> dict[str, Any]:
    laws = {name: _filled(LAW, law) for name, law in (certificate.get("laws") or {}).items()}
    own = {"verdict": "unknown", "dtype": "", "reference": "", "worst_ratio": None, "chunking_used": None}
    state = {"state": _filled(STATE, certificate["state"])} if certificate.get("state") else {}
    return {**_filled(own, certificate), "laws": laws, **state}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_curve(curve: Any) -> bool:
    if not isinstance(curve, dict):
        return False
    x, y = curve.get("x"), curve.get("y")
    return isinstance(x, list) and isinstance(y, list) and len(x) == len(y) and all(map(_finite, (*x, *y)))
