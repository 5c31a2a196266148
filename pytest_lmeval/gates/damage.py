"""What is not in a baseline as it was written: each field of the summary, and the summary against the examples.

A gate must not pass because its baseline was cut off, and nobody should read a traceback because of a merge that went wrong.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pytest_lmeval.gates.scores import LOGARITHMIC, Scores

Place = list[str]
Problem = tuple[Place, str]
Field = tuple[str, Callable[[Any], bool]]  # what stands there, in words, and whether a value is that


def is_number(value: Any) -> bool:
    """Whether a value that was read from JSON is a number that a float can hold.

    >>> is_number(3), is_number(True), is_number(float("inf")), is_number(10**400)
    (True, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _or_null(field: Field) -> Field:
    words, is_that = field
    return f"{words} or null", lambda value: value is None or is_that(value)


OBJECT: Field = ("an object", lambda value: isinstance(value, dict))
TEXT: Field = ("a text", lambda value: isinstance(value, str))
NUMBER: Field = ("a number", is_number)
COUNT: Field = ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
YES_OR_NO: Field = ("true or false", lambda value: isinstance(value, bool))
POSITIVE: Field = ("a number above 0", lambda value: is_number(value) and value > 0)

RECORD = {**dict.fromkeys(("test", "kind", "subject"), TEXT), "settings": OBJECT, "gate": _or_null(OBJECT)}  # of a run
DOCUMENT = {"environment": OBJECT, "tests": OBJECT}
ENTRY = {
    **dict.fromkeys(("lm", "settings", "metrics", "costs"), OBJECT),
    **dict.fromkeys(("headline", "verdict"), _or_null(TEXT)),
}
LM = dict.fromkeys(("spec", "dtype", "device", "fingerprint"), TEXT)
METRIC = {
    "value": NUMBER,
    "low": _or_null(NUMBER),
    "high": _or_null(NUMBER),
    "n": _or_null(COUNT),
    "unit": TEXT,
    "higher_is_better": _or_null(YES_OR_NO),
}
POSITIVES = {"value": POSITIVE, "low": _or_null(POSITIVE), "high": _or_null(POSITIVE)}


def problems(document: dict[str, Any]) -> Iterator[Problem]:
    """What is not as it would have been written: where, and what."""
    if found := list(unlike(document, DOCUMENT, [])):
        yield from found
        return
    yield from unlike({"packages": None, **document["environment"]}, {"packages": _or_null(OBJECT)}, ["environment"])
    yield from unlike(document["tests"], dict.fromkeys(document["tests"], OBJECT), ["tests"])
    for test, records in _objects(document["tests"]):
        yield from unlike(records, dict.fromkeys(records, OBJECT), ["tests", test])
        for record, entry in _objects(records):
            yield from _of_entry(entry, ["tests", test, record])


def _of_entry(entry: dict[str, Any], place: Place) -> Iterator[Problem]:
    if found := list(unlike(entry, ENTRY, place)):
        yield from found
        return
    yield from unlike(entry["lm"], LM, [*place, "lm"])
    yield from unlike(entry["costs"], dict.fromkeys(entry["costs"], NUMBER), [*place, "costs"])
    yield from unlike(entry["metrics"], dict.fromkeys(entry["metrics"], OBJECT), [*place, "metrics"])
    for name, metric in _objects(entry["metrics"]):
        yield from unlike(metric, {**METRIC, **(POSITIVES if name in LOGARITHMIC else {})}, [*place, "metrics", name])
    if (first := entry["headline"]) is not None and first not in entry["metrics"]:
        yield [*place, "headline"], f"is {json.dumps(first)}, which is none of its metrics"


def _objects(value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, inner) for name, inner in value.items() if isinstance(inner, dict))


def unlike(value: dict[str, Any], fields: dict[str, Field], place: Place) -> Iterator[Problem]:
    """The fields that are missing, or not what they should be."""
    for name, (wanted, is_that) in fields.items():
        if name not in value:
            yield [*place, name], f"is missing, where {wanted} stands"
        elif not is_that(value[name]):
            yield [*place, name], f"is {_shown(value[name])}, where {wanted} stands"


def _shown(value: Any) -> str:
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else json.dumps(value)[:60]


def contradictions(
    tests: dict[str, dict[str, dict[str, Any]]], scores: dict[tuple[str, str], Scores]
) -> Iterator[tuple[str, str, str]]:
    """Where the examples do not make the number that the summary says: test, record, and what each of them says."""
    for (test, record), found in scores.items():
        metrics = tests.get(test, {}).get(record, {}).get("metrics", {})
        for name, metric in metrics.items():
            if (made := found.made(name)) is None or metric["n"] is None:
                continue
            mean, n = made
            said = math.log(metric["value"]) if name in LOGARITHMIC else metric["value"]
            if n != metric["n"] or mean is None or not math.isclose(mean, said, rel_tol=1e-5, abs_tol=1e-9):
                what = "nothing" if mean is None else f"{math.exp(mean) if name in LOGARITHMIC else mean:.7g}"
                yield test, record, f"{name} is {metric['value']:.7g} of {metric['n']:,}, and its examples make {what} of {n:,}"
