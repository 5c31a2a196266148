"""What stands at the top and at the end of a report: what was run on what, what failed, the certificates, the environment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.report.changes import changes, counted
from pytest_lmeval.report.words import told_apart


@dataclass(frozen=True)
class Overview:
    """headline  how many tests passed, in words
    judged    what gates found, in words; "" without a baseline
    outcome   "passed", "failed", or "" where several runs are compared, each of which has its own
    failed    tests that failed, each with its message ("" where none is known) and the place of its first record (or None)
    """

    headline: str
    judged: str
    outcome: str
    failed: list[tuple[str, str, int | None]]


@dataclass(frozen=True)
class Laws:
    """Verdicts by law: `kept` holds for each model and law "kept", "broken", "not tried", or "" where it was not asked."""

    names: list[str]
    models: list[str]
    kept: list[list[str]]


@dataclass(frozen=True)
class Fact:
    """A line of the environment: a value for each run, and whether they are the same."""

    name: str
    values: list[str]
    same: bool


def overview(document: dict[str, Any]) -> Overview:
    """Of a run, or of several that are compared (`merge.merge`)."""
    if runs := document.get("runs"):
        return Overview("1 run" if len(runs) == 1 else f"{len(runs)} runs side by side", "", "", [])
    records = document["records"]
    first = {record["test"]: place for place, record in reversed(list(enumerate(records)))}
    messages = {failure.get("test", ""): failure.get("message", "") for failure in document["failures"]}
    messages = {record["test"]: "" for record in records if record["outcome"] == "failed"} | messages
    judged = changes(records)
    worse = {change.test for change in judged if change.verdict == "worse"} - messages.keys()
    headline = _headline(len({*first, *messages}), len(messages), len(worse))
    failed = [(test, message, first.get(test)) for test, message in messages.items()]
    return Overview(headline, counted(change.verdict for change in judged), "failed" if messages else "passed", failed)


def _headline(tests: int, failed: int, worse: int) -> str:
    """`worse`: how many of the others have a number that is worse than the baseline, of which a gate only warned."""
    if not tests:
        return "Nothing was measured"
    if failed:
        told, of = f"{failed:,} of {tests:,} tests failed", "of the others, "
    else:
        told, of = "The test passed" if tests == 1 else f"All {tests:,} tests passed", ""
    return told + (f"; {of}{worse:,} {'is' if worse == 1 else 'are'} worse than the baseline" if worse else "")


def certificates(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int | None]]:
    """Each certificate once, with its model, and for each record which of them is its own."""
    found: dict[str, int] = {}
    shown: list[dict[str, Any]] = []
    own: list[int | None] = []
    for record in records:
        if record["certificate"] is None:
            own.append(None)
            continue
        certificate = {**record["certificate"], "chunking_used": None, "spec": record["lm"]["spec"]}
        identity = json.dumps(certificate, sort_keys=True, default=str)
        if identity not in found:
            found[identity] = len(shown)
            shown.append(certificate)
        own.append(found[identity])
    return shown, own


def laws(shown: list[dict[str, Any]]) -> Laws:
    """Which law each certified model keeps."""
    names = list(dict.fromkeys(name for certificate in shown for name in certificate["laws"]))
    models = told_apart([(certificate["spec"], certificate["dtype"]) for certificate in shown])
    return Laws(names, models, [[_kept(certificate["laws"].get(name)) for name in names] for certificate in shown])


def _kept(law: dict[str, Any] | None) -> str:
    if law is None:
        return ""
    if law["unavailable"]:
        return "not tried"
    return "kept" if law["kept"] else "broken"


def environment(environments: list[dict[str, Any]]) -> list[Fact]:
    """The environments of the runs, side by side."""
    flat = [{**own, **(own.get("packages") or {})} for own in environments]
    names = dict.fromkeys(name for own in flat for name in own if name != "packages")
    facts = []
    for name in names:
        values = ["unknown" if own.get(name) is None else str(own[name]) for own in flat]
        facts.append(Fact(name, values, len(set(values)) == 1))
    return facts
