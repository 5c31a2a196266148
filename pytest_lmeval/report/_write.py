"""Write the reports of a run: metrics.json first, then the pages rendered from it."""

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

HOOK = "pytest_lmeval_report"


def run(started: float, arguments: Sequence[object], exit_status: int) -> Run:
    """Describe the run that ends now. `started` is in seconds since 1970, `arguments` are those of pytest."""
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
    """Write the reports of a run; returns lines that name the files and what went wrong.

    root       folder of the project, whose commit is recorded
    templates  folder of templates that extend ours
    extend     the hook `pytest_lmeval_report`, which changes the document in place before the pages are rendered

    The numbers are saved first: a hook or a page that fails costs only itself.
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
    return [f"written to {_readable(folder)}: {', '.join(written)}", *notes, *github.workflow_commands(document, os.environ)]


def _extended(document: RunDocument, extend: Callable[[RunDocument], object], folder: Path, notes: list[str]) -> RunDocument:
    """The document as the hooks changed it, saved; or unchanged if a hook fails or makes it invalid."""
    remedy = "Make it of the types in pytest_lmeval: Record, Section, Series, Value"
    changed = schema.checked(document, "the document", remedy)
    try:
        extend(changed)
        changed = schema.checked(changed, "the changed document", remedy)
        pages.render("summary.md", changed)  # raises if no page can show it
    except Exception as error:  # noqa: BLE001 - a hook may raise anything
        notes.append(f"{HOOK} failed and its changes are left out ({type(error).__name__}: {error})")
        return document
    if (text := dump(changed)) != dump(document):
        replace_text(folder / NAME, text)
    return changed


def _pages(folder: Path, document: RunDocument, templates: Path | None, notes: list[str]) -> list[str]:
    """Render and write the pages; returns the names of those that succeeded."""
    shown, written = pages.with_sections(document, folder), []
    notes += shown.problems[len(document.problems) :]
    for name in pages.PAGES:
        try:
            page = pages.render(name, shown, folders=[folder], templates=templates)
            replace_text(folder / name, page)
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)  # the page of an earlier run would be taken for this one's
            again = f"lmeval render {_readable(folder)}" + (f" --templates {templates}" if templates else "")
            notes.append(f"{name} was not rendered: {pages.where(error)}. All numbers are in {NAME}; then: {again}")
            continue
        written.append(name)
        if name == "summary.md":
            try:
                github.append_summary(page, os.environ)
            except OSError as error:
                notes.append(f"nothing could be added to GITHUB_STEP_SUMMARY ({error})")
    return written


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically. Lone surrogates, which UTF-8 cannot encode, are escaped."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


def _readable(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
