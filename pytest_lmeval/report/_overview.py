"""What stands at the top and at the end of a report: what was run on what, what failed, the certificates, the environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._certificate import Certificate, LawResult
from pytest_lmeval.records._document import Environment, RunDocument
from pytest_lmeval.records._measured import Record
from pytest_lmeval.report._changes import changes, counted
from pytest_lmeval.report._words import disambiguate


@dataclass(frozen=True)
class Overview:
    """headline  how many tests passed, in words
    judged    what gates found, in words; "" without a baseline
    outcome   "passed", "failed", or "" where several runs are compared, each of which has its own
    failed    tests that failed, each with its message ("" where none is known) and the index of its first record (or None)
    """

    headline: str
    judged: str
    outcome: str
    failed: list[tuple[str, str, int | None]]


@dataclass(frozen=True)
class Laws:
    """Verdicts by law: `kept` holds for each model and law "kept", "broken", "not tried", or "" where it was not tested."""

    names: list[str]
    models: list[str]
    kept: list[list[str]]


@dataclass(frozen=True)
class Fact:
    """A line of the environment: a value for each run, and whether they are the same."""

    name: str
    values: list[str]
    same: bool


def overview(document: RunDocument) -> Overview:
    """Of a run, or of several that are compared (`report._merge.merge`)."""
    if runs := document.runs:
        return Overview("1 run" if len(runs) == 1 else f"{len(runs)} runs side by side", "", "", [])
    records = document.records
    first = {record.test: index for index, record in reversed(list(enumerate(records)))}
    messages = {record.test: "" for record in records if record.outcome == "failed"}
    messages |= {failure.test: failure.message for failure in document.failures}
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


def certificates(records: Sequence[Record]) -> tuple[list[tuple[str, Certificate]], list[int | None]]:
    """Each certificate once, with the spec of its model, and for each record the index of its own."""
    found: dict[str, int] = {}
    shown: list[tuple[str, Certificate]] = []
    own: list[int | None] = []
    for record in records:
        if record.certificate is None:
            own.append(None)
            continue
        certificate = replace(record.certificate, chunking_used=None)  # the one thing that differs from record to record
        identity = f"{record.lm.spec} {schema.to_plain(certificate)}"
        if identity not in found:
            found[identity] = len(shown)
            shown.append((record.lm.spec, certificate))
        own.append(found[identity])
    return shown, own


def laws(shown: Sequence[tuple[str, Certificate]]) -> Laws:
    """Which law each certified model keeps."""
    names = list(dict.fromkeys(name for _, certificate in shown for name in certificate.laws))
    models = disambiguate([(spec, certificate.dtype) for spec, certificate in shown])
    return Laws(names, models, [[_kept(certificate.laws.get(name)) for name in names] for _, certificate in shown])


def _kept(law: LawResult | None) -> str:
    if law is None:
        return ""
    if law.unavailable:
        return "not tried"
    return "kept" if law.kept else "broken"


def facts(environments: Sequence[Environment]) -> list[Fact]:
    """The environments of the runs, side by side."""
    flat = [schema.to_plain(own) for own in environments]
    flat = [{**{name: value for name, value in own.items() if name != "packages"}, **own["packages"]} for own in flat]
    found = []
    for name in dict.fromkeys(name for own in flat for name in own):
        values = ["unknown" if own.get(name) is None else str(own[name]) for own in flat]
        found.append(Fact(name, values, len(set(values)) == 1))
    return found
