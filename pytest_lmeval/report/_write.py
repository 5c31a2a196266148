"""Write the reports of a run: metrics.json first, then the pages rendered from it."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_lmeval.records import _environment as environment, _history as history, _schema as schema
from pytest_lmeval.records._document import NAME, Failure, Run, RunDocument, Skipped, dump
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.records._secrets import masked_command
from pytest_lmeval.report import _github as github, _pages as pages

HOOK = "pytest_lmeval_report"


@dataclass(frozen=True)
class Written:
    """Where the reports of a run are: the folder that was asked for, another one, or None; and lines that say so, with what
    went wrong."""

    folder: Path | None
    lines: list[str]


def run(started: float, arguments: Sequence[object], exit_status: int) -> Run:
    """Describe the run that ends now. `started` is in seconds since 1970, `arguments` are those of pytest."""
    return Run(
        id=uuid.uuid4().hex[:12],
        started=datetime.datetime.fromtimestamp(started, datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 3),
        command=masked_command(["pytest", *map(str, arguments)]),
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
) -> Written:
    """Write the reports of a run.

    root       folder of the project, whose commit is recorded
    templates  folder of templates that extend ours
    extend     the hook `pytest_lmeval_report`, which changes the document in place before the pages are rendered

    The numbers are saved first: a hook or a page that fails costs only itself. What cannot be written to `folder` goes to a new
    folder among the temporary ones.
    """
    described = environment.describe(
        root=root,
        device=", ".join(sorted({record.lm.device for record in records})),
        threads=sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        seed=0,
    )
    document = RunDocument(run=run, environment=described, records=records, skipped=skipped or [], failures=failures or [])
    notes: list[str] = []
    saved = _save(folder, dump(document), notes)
    if saved is not None and extend is not None:
        document = _extended(document, extend, saved, notes)
    try:
        history.append(folder, document)
    except (OSError, ValueError) as error:
        notes.append(f"nothing could be added to {history.NAME} ({error})")
    if saved is not None:
        written = [NAME, *_pages(saved, document, templates, notes, examples=folder)]
        notes.insert(0, f"written to {_readable(saved)}: {', '.join(written)}")
    return Written(saved, [*notes, *github.workflow_commands(document, os.environ)])


def _save(folder: Path, text: str, notes: list[str]) -> Path | None:
    """Write `metrics.json`; returns the folder that has it. Where that is another one, deletes the report of an earlier run,
    which would be taken for this one's."""
    try:
        replace_text(folder / NAME, text)
        return folder
    except OSError as error:
        why = f"{NAME} could not be written to {_readable(folder)} ({error.strerror or error})"
    for name in (NAME, *pages.PAGES):
        with suppress(OSError):
            (folder / name).unlink()
    again = "make room there, or name another folder with --lmeval-dir, and run the tests again: finished results are kept"
    try:
        other = Path(tempfile.mkdtemp(prefix="lmeval-"))
        replace_text(other / NAME, text)
    except OSError as error:
        notes.append(
            f"{why}, nor to {tempfile.gettempprefix()} folders ({error.strerror or error}). Nothing is written: {again}."
        )
        return None
    notes.append(f"{why}, so this run's report is in {other}. Move it, or {again}.")
    return other


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
        try:
            replace_text(folder / NAME, text)
        except OSError as error:
            notes.append(f"what {HOOK} changed could not be saved, and is left out ({error})")
            return document
    return changed


def _pages(folder: Path, document: RunDocument, templates: Path | None, notes: list[str], *, examples: Path) -> list[str]:
    """Render and write the pages, with the files of the folder `examples`; returns the names of those that succeeded."""
    shown, written = pages.with_sections(document, examples), []
    notes += shown.problems[len(document.problems) :]
    for name in pages.PAGES:
        try:
            page = pages.render(name, shown, folders=[examples], templates=templates)
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
