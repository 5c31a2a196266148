"""Reading a `metrics.json` back: what it must have, what is filled in where it lacks something, and what is said of that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.records.record import SCHEMA

Fields = dict[str, Any]  # name -> its default, or a kind (`float` is any number): null where it is missing

BASELINE: Fields = {"file": "", "unlike": []}
LM: Fields = {"spec": "unknown model", "parameters": float, "bytes": float, "dtype": "", "device": "", "fingerprint": ""}
RUN: Fields = {"id": "", "started": "", "seconds": float, "command": "", "exit_status": float}
ENVIRONMENT: Fields = {
    "python": "",
    "torch": "",
    "device": "",
    "cpu": "",
    "threads": float,
    "commit": str,
    "dirty": bool,
    "packages": {},
}
RECORD: Fields = {
    "test": "",
    "kind": "custom",
    "subject": "",
    "outcome": "",
    "certificate": dict,
    "examples": str,
}
PARTS: Fields = {name: {} for name in ("lm", "settings", "metrics", "cost", "series")}
COST: Fields = dict.fromkeys(("seconds", "tokens", "flops", "peak_bytes", "state_bytes"), float)
METRIC: Fields = {"value": float, "unit": "", "low": float, "high": float, "n": float, "higher_is_better": bool}
CURVE: Fields = {"x_unit": "", "y_unit": ""}
SETTINGS: Fields = {
    **dict.fromkeys(("window", "overlap", "truncated", "moved_borders", "ties", "not_questions", "not_asked"), float),
    **dict.fromkeys(("reading", "stability", "not_measured", "failure"), str),
    "failed": list,
}
GATE: Fields = {
    **dict.fromkeys(("difference", "low", "high", "p", "level", "detectable"), float),
    **dict.fromkeys(("needed", "n", "units", "only_base", "only_new", "lost", "won"), float),
    **dict.fromkeys(("verdict", "note", "test"), str),
    **dict.fromkeys(("flipped", "unlike"), list),
}
CERTIFICATE: Fields = {
    "verdict": "unknown",
    "dtype": "",
    "reference": "",
    "worst_ratio": float,
    "chunking_used": str,
    "laws": {},
}
LAW: Fields = {"kept": True, "cases": 0, "planned": 0, "worst_ratio": float, "counterexample": str, "unavailable": str}
STATE: Fields = {"bytes": 0, "tokens": 0, "bytes_per_token": 0.0, "dtypes": []}
ITEMS: dict[str, Fields] = {
    "skipped": {"test": "", "reason": ""},
    "failures": {"test": "", "message": "", "file": str, "line": float},
    "sections": {"title": "", "text": "", "columns": [], "rows": []},
}
OPTIONAL: Fields = {  # what the schema leaves to the record
    **dict.fromkeys(("gate", "state"), dict),
    **dict.fromkeys(("limit", "float32"), str),
    "longest": float,
    "not_reached": list,
    "counterexamples": list,
}
LISTS = (*ITEMS, "problems")


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
    return complete({name: value for name, value in document.items() if name != "runs"})  # a file is of one run


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """A copy in which every field of the schema is there, of its kind. What had to be left out stands in its `problems`."""
    given = document.get("problems")
    problems = [str(problem) for problem in given] if isinstance(given, list) else []
    lists = {name: _objects(document.get(name), name, problems) for name in (*ITEMS, "records")}
    return {
        **document,
        **{name: [_filled(ITEMS[name], item, place, problems) for place, item in lists[name]] for name in ITEMS},
        "sections": [_section(item, place, problems) for place, item in lists["sections"]],
        "schema": SCHEMA,
        "run": _filled(RUN, document.get("run"), "run", problems),
        "environment": _filled(ENVIRONMENT, document.get("environment"), "environment", problems),
        "baseline": _filled(BASELINE, document.get("baseline"), "baseline", problems),
        "records": [_record(record, place, problems) for place, record in lists["records"]],
        "problems": problems,
    }


def _filled(fields: Fields, given: Any, what: str, problems: list[str]) -> dict[str, Any]:
    """What is given and is of its kind, and the defaults for what is not, or is missing or null."""
    defaults = {name: None if isinstance(field, type) else field for name, field in fields.items()}
    return {**defaults, **_fitting({**OPTIONAL, **fields}, given, what, problems)}


def _fitting(fields: Fields, given: Any, what: str, problems: list[str]) -> dict[str, Any]:
    """What is given but for nulls where there is a default, and for what is not of its kind, which is said."""
    kept = {}
    for name, value in _object(given, what, problems).items():
        field = fields.get(name, object)
        kind = field if isinstance(field, type) else type(field)
        if (value is None and field is kind) or _is(value, kind):
            kept[name] = value
        elif value is not None:
            problems.append(f"{what}: {name} is {_shown(value)}, no {KINDS[kind]}, and was left out")
    return kept


KINDS = {str: "text", bool: "true or false", int: "number", float: "number", dict: "object", list: "list"}


def _is(value: Any, kind: type) -> bool:
    return _finite(value) if kind in (int, float) else isinstance(value, kind)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _object(given: Any, what: str, problems: list[str]) -> dict[str, Any]:
    """A nested object; an empty one for what is none, which is said."""
    if given is not None and not isinstance(given, dict):
        problems.append(f"{what} is {_shown(given)}, no object, and was left out")
    return given if isinstance(given, dict) else {}


def _objects(given: Any, what: str, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place in words."""
    if given is not None and not isinstance(given, list):
        problems.append(f"{what} is {_shown(given)}, no list, and was left out")
    items = enumerate(given if isinstance(given, list) else (), start=1)
    named = [(f"{what.removesuffix('s')} {number}", item) for number, item in items]
    for place, item in named:
        if not isinstance(item, dict):
            problems.append(f"{place} is {_shown(item)}, no object, and was left out")
    return [(place, item) for place, item in named if isinstance(item, dict)]


def _section(section: dict[str, Any], what: str, problems: list[str]) -> dict[str, Any]:
    found = _filled(ITEMS["sections"], section, what, problems)
    if not all(isinstance(row, list) for row in found["rows"]):
        problems.append(f"{what}: rows that are no list were left out")
    return {**found, "rows": [row for row in found["rows"] if isinstance(row, list)]}


def _record(record: dict[str, Any], what: str, problems: list[str]) -> dict[str, Any]:
    which = f"{what} ({record.get('test') or record.get('subject') or 'nameless'})"
    found = _filled({**RECORD, **PARTS}, record, which, problems)
    if gate := found.get("gate"):
        rows = {name: _fitting(GATE, row, f"{which}: gate of {name}", problems) for name, row in gate.items()}
        found["gate"] = {name: row for name, row in rows.items() if row}
    certificate = found["certificate"]
    return {
        **found,
        "lm": _filled(LM, found["lm"], f"{which}: lm", problems),
        "settings": _fitting(SETTINGS, found["settings"], f"{which}: settings", problems),
        "metrics": _metrics(found["metrics"], which, problems),
        "cost": _filled(COST, found["cost"], f"{which}: cost", problems),
        "series": _series(found["series"], which, problems),
        "certificate": None if certificate is None else _certificate(certificate, f"{which}: certificate", problems),
    }


def _metrics(given: dict[str, Any], which: str, problems: list[str]) -> dict[str, Any]:
    kept = {}
    for name, metric in given.items():
        if not isinstance(metric, dict) or not _finite(metric.get("value")):
            problems.append(f"{which}: {name} has no value, and was left out")
            continue
        kept[name] = _filled(METRIC, metric, f"{which}: {name}", problems)
        if None in (kept[name]["low"], kept[name]["high"]):
            kept[name] |= {"low": None, "high": None}
    return kept


def _series(given: dict[str, Any], which: str, problems: list[str]) -> dict[str, Any]:
    kept = {}
    for name, curve in given.items():
        if _is_curve(curve):
            kept[name] = _filled(CURVE, curve, f"{which}: the series {name}", problems)
        else:
            problems.append(f"{which}: the series {name} is no curve, and was left out")
    return kept


def _certificate(certificate: dict[str, Any], what: str, problems: list[str]) -> dict[str, Any]:
    found = _filled(CERTIFICATE, certificate, what, problems)
    found["laws"] = {name: _law(law, f"{what}: {name}", problems) for name, law in found["laws"].items()}
    if state := found.get("state"):
        found["state"] = _filled(STATE, state, f"{what}: state", problems)
    return found


def _law(law: Any, what: str, problems: list[str]) -> dict[str, Any]:
    found = _filled(LAW, law, what, problems)
    if cases := found.get("counterexamples"):
        found["counterexamples"] = [case for case in cases if isinstance(case, dict) and isinstance(case.get("replay"), str)]
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_curve(curve: Any) -> bool:
    if not isinstance(curve, dict):
        return False
    x, y = curve.get("x"), curve.get("y")
    return isinstance(x, list) and isinstance(y, list) and len(x) == len(y) and all(map(_finite, (*x, *y)))
