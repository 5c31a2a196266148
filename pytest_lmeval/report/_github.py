"""Write what GitHub Actions shows: the summary of the step, and an annotation for each test that failed or got worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_lmeval.records._document import RunDocument
from pytest_lmeval.report._changes import changes
from pytest_lmeval.report._words import visible

LIMIT = 1024 * 1024 - 1024  # bytes of a step's summary; GitHub shows nothing of a longer one
CUT = "\n\nThe summary continues in summary.md: GitHub shows no more than 1 MiB of it.\n"


def append_summary(markdown: str, environ: Mapping[str, str]) -> bool:
    """Append a page to the step's summary; False if there is none. Raises OSError."""
    file = environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return False
    raw = markdown.encode(errors="backslashreplace")
    with open(file, "ab") as summary:
        if (left := LIMIT - summary.tell()) < len(raw):
            raw = raw[: max(0, left - len(CUT))].rpartition(b"\n")[0] + CUT.encode()
        summary.write(raw + b"\n")
    return True


def workflow_commands(document: RunDocument, environ: Mapping[str, str]) -> list[str]:
    """Workflow commands: an error for each failed test, a warning for each metric that got worse without failing one."""
    if environ.get("GITHUB_ACTIONS") != "true":
        return []
    failed = {failure.test for failure in document.failures}
    lines = [
        _command("error", failure.message or "failed", file=failure.file, line=failure.line, title=failure.test)
        for failure in document.failures
    ]
    for change in changes(document.records):
        test, subject = change.record.test, change.record.subject
        if change.verdict == "worse" and test not in failed:
            message = f"{change.metric} on {subject} got worse: {change.base} -> {change.new}, {change.difference}"
            lines.append(_command("warning", message, file=test.partition("::")[0], title=test))
    return lines


def _command(kind: str, message: str, **properties: Any) -> str:
    """`::error file=...,line=...::message`, escaped like GitHub's toolkit."""
    given = ",".join(f"{name}={_escaped(str(value), ':,')}" for name, value in properties.items() if value)
    return f"::{kind} {given}::{_escaped(message)}"


def _escaped(text: str, more: str = "") -> str:
    text = visible(text)
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
