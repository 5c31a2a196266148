"""Write what a run leaves behind: metrics.json first, then the pages that are rendered from it."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pytest_lmeval.records import _environment as environment, _history as history, _schema as schema
from pytest_lmeval.records._document import NAME, Failure, Run, RunDocument, Skipped, dump
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.report import _github as github, _pages as pages
from pytest_lmeval.report._sections import with_sections

HOOK = "pytest_lmeval_report"


def run(started: float, arguments: Sequence[object], exit_status: int) -> Run:
    """The run that ends now. `started` is in seconds since 1970, `arguments` are those of pytest."""
    return Run(
        id=uuid.uuid4().hex[:12],
        started=datetime.datetime.fromtimestamp(started, datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 3),
        command=shlex.join(["pytest", *map(str, arguments)]),
        exit_status=exit_status,
    )


def reports(
    folder: Path,
    records: list[Record],
    *,
    run: Run,
    root: Path,
    skipped: list[Skipped] | None = None,
    failures: list[Failure] | None = None,
    templates: Path | None = None,
    extend: Callable[[RunDocument], object] | None = None,
) -> list[str]:
    """Write the reports of a run; returns lines that say where they are, or what went wrong with one.

    root       folder of the project, whose commit is recorded
    templates  a folder of templates that extend ours
    extend     changes the document in place before the pages are rendered: the hook `pytest_lmeval_report`

    The numbers are saved before anything else is done: a hook or a page that fails costs only itself.
    """
    described = environment.describe(
        root=root,
        device=", ".join(sorted({record.lm.device for record in records})),
        threads=sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        seed=0,
    )
    document = RunDocument(run=run, environment=described, records=records, skipped=skipped or [], failures=failures or [])
    replace_text(folder / NAME, dump(document))
    notes: list[str] = []
    if extend is not None:
        document = _extended(document, extend, folder, notes)
    try:
        history.append(folder, document)
    except (OSError, ValueError) as error:
        notes.append(f"nothing could be added to {history.NAME} ({error})")
    written = [NAME, *_pages(folder, document, templates, notes)]
    return [f"written to {_readable(folder)}: {', '.join(written)}", *notes, *github.marks(document, os.environ)]


def _extended(document: RunDocument, extend: Callable[[RunDocument], object], folder: Path, notes: list[str]) -> RunDocument:
    """The document as a project's hooks changed it, saved; or as it was, if one of them fails or makes something else of it."""
    again = "Make it of the types in pytest_lmeval: Record, Section, Series, Value"
    changed = schema.checked(document, "the document", again)
    try:
        extend(changed)
        changed = schema.checked(changed, "what it made", again)
        pages.render("summary.md", changed)  # what no page can show is no document any more
    except Exception as error:  # noqa: BLE001 - a hook may raise anything
        notes.append(f"{HOOK} failed, and its changes were left out ({type(error).__name__}: {error})")
        return document
    if (text := dump(changed)) != dump(document):
        replace_text(folder / NAME, text)
    return changed


def _pages(folder: Path, document: RunDocument, templates: Path | None, notes: list[str]) -> list[str]:
    """Render and write the pages; returns the names of those that went well."""
    shown, written = with_sections(document, folder), []
    notes += shown.problems[len(document.problems) :]
    for name in pages.PAGES:
        try:
            page = pages.render(name, shown, folders=[folder], templates=templates)
            replace_text(folder / name, page)
            written.append(name)
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)  # that of an earlier run would pass for this one's
            again = f"lmeval render {_readable(folder)}" + (f" --templates {templates}" if templates else "")
            notes.append(f"{name} was not rendered: {pages.where(error)}. All numbers are in {NAME}; then: {again}")
        else:
            if name == "summary.md":
                _to_github(page, notes)
    return written


def _to_github(page: str, notes: list[str]) -> None:
    try:
        github.append_summary(page, os.environ)
    except OSError as error:
        notes.append(f"nothing could be added to GITHUB_STEP_SUMMARY ({error})")


def replace_text(path: Path, text: str) -> None:
    """Write a file in one move. Half of a surrogate pair, which UTF-8 has no bytes for, is written out."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


def _readable(folder: Path) -> str:
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
