"""What GitHub Actions shows: the summary of the step, and a mark at each test that failed or got worse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_lmeval.records._document import RunDocument
from pytest_lmeval.report._changes import changes

LIMIT = 1024 * 1024 - 1024  # bytes that GitHub takes of a step's summary; more, and it shows none of it
CUT = "\n\nThe summary goes on in summary.md: GitHub shows no more than 1 MiB of it.\n"


def append_summary(markdown: str, environ: Mapping[str, str]) -> bool:
    """Append a page to the step's summary; False where there is no such file. Raises OSError."""
    file = environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return False
    there = Path(file).stat().st_size if Path(file).exists() else 0
    raw = markdown.encode(errors="backslashreplace")
    if (left := LIMIT - there) < len(raw):
        raw = raw[: max(0, left - len(CUT))].rpartition(b"\n")[0] + CUT.encode()
    with open(file, "ab") as summary:
        summary.write(raw + b"\n")
    return True


def marks(document: RunDocument, environ: Mapping[str, str]) -> list[str]:
    """Workflow commands: an error for each test that failed, a warning for each metric that got worse without failing one."""
    if environ.get("GITHUB_ACTIONS") != "true":
        return []
    failed = {failure.test for failure in document.failures}
    lines = [
        _command("error", failure.message or "failed", file=failure.file, line=failure.line, title=failure.test)
        for failure in document.failures
    ]
    for change in changes(document.records):
        if change.verdict == "worse" and change.test not in failed:
            said = f"{change.metric} on {change.subject} got worse: {change.base} -> {change.new}, {change.difference}"
            lines.append(_command("warning", said, file=change.test.partition("::")[0], title=change.test))
    return lines


def _command(kind: str, message: str, **properties: Any) -> str:
    """`::error file=...,line=...::message`, escaped as GitHub's toolkit escapes it."""
    given = ",".join(f"{name}={_escaped(str(value), ':,')}" for name, value in properties.items() if value)
    return f"::{kind} {given}::{_escaped(message)}"


def _escaped(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
