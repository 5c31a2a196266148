"""Summarize a document: its headline, failures, certificates and environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._document import Environment, RunDocument
from pytest_lmeval.records._measured import Record
from pytest_lmeval.report._changes import changes, counted
from pytest_lmeval.report._words import disambiguate, several


@dataclass(frozen=True)
class Overview:
    """headline  how many tests passed, in words
    judged    verdicts of gates, in words; "" without a baseline
    outcome   "passed", "failed"; "" for a comparison of runs, a run that did not end, and one that measured nothing
    failed    failed tests, each with its message ("" if unknown) and the index of its first record (or None)
    """

    headline: str
    judged: str
    outcome: str
    failed: list[tuple[str, str, int | None]]


def overview(document: RunDocument) -> Overview:
    """Summarize a run, or a comparison of runs (`report._compare.merge`)."""
    if runs := document.runs:
        return Overview("1 run" if len(runs) == 1 else f"{len(runs)} runs side by side", "", "", [])
    records = document.records
    first = {record.test: index for index, record in reversed(list(enumerate(records)))}
    messages = {record.test: "" for record in records if record.outcome == "failed"}
    messages |= {failure.test: failure.message for failure in document.failures}
    judged = changes(records)
    worse = {change.record.test for change in judged if change.verdict == "worse"} - messages.keys()
    tests = len({*first, *messages})
    if document.run.exit_status is None:
        headline, outcome = f"The run did not end: {several(tests, 'test')} measured something before", ""
    elif not records:
        headline, outcome = _nothing(len(messages), len(document.skipped)), "failed" if messages else ""
    else:
        headline, outcome = _headline(tests, len(messages), len(worse)), "failed" if messages else "passed"
    failed = [(test, message, first.get(test)) for test, message in messages.items()]
    return Overview(headline, counted(change.verdict for change in judged), outcome, failed)


def _nothing(failed: int, others: int) -> str:
    counts = [f"{several(failed, 'test')} failed"] if failed else []
    counts += [f"{several(others, 'test')} recorded nothing"] if others else []
    return ": ".join(filter(None, ("Nothing was measured", ", ".join(counts))))


def _headline(tests: int, failed: int, worse: int) -> str:
    """worse  number of passed tests with a number that is worse than the baseline, of which a gate only warned"""
    if failed:
        outcome, of = f"{failed:,} of {tests:,} tests failed", "of the others, "
    else:
        outcome, of = "The test passed" if tests == 1 else f"All {tests:,} tests passed", ""
    return outcome + (f"; {of}{worse:,} {'is' if worse == 1 else 'are'} worse than the baseline" if worse else "")


def certificates(records: Sequence[Record]) -> tuple[list[tuple[str, Certificate]], list[int | None]]:
    """The distinct certificates with labels of their models, and for each record the index of its certificate."""
    found: list[tuple[str, Certificate]] = []
    own: list[int | None] = []
    for record in records:
        if record.certificate is None:
            own.append(None)
            continue
        one = record.lm.spec, replace(record.certificate, chunking_used=None, audit=None)  # what differs between records
        if one not in found:
            found.append(one)
        own.append(found.index(one))
    labels = disambiguate([(spec, certificate.dtype) for spec, certificate in found])
    return [(label, certificate) for label, (_, certificate) in zip(labels, found, strict=True)], own


def facts(environments: Sequence[Environment]) -> list[tuple[str, list[str], bool]]:
    """Name, value in each run, and whether all are equal, for each fact of the environment."""
    flat = [schema.to_plain(own) for own in environments]
    flat = [{**{name: value for name, value in own.items() if name != "packages"}, **own["packages"]} for own in flat]
    found = []
    for name in dict.fromkeys(name for own in flat for name in own):
        values = ["unknown" if own.get(name) is None else str(own[name]) for own in flat]
        found.append((name, values, len(set(values)) == 1))
    return found
