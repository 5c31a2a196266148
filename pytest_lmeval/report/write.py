"""Writes what a run leaves behind: metrics.json first, then the pages that are rendered from it."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_lmeval.records import environment, history
from pytest_lmeval.records.record import SCHEMA
from pytest_lmeval.records.replacing import replacing
from pytest_lmeval.report import github, pages
from pytest_lmeval.report.document import complete

Document = dict[str, Any]


def reports(
    folder: Path,
    records: list[dict[str, Any]],
    *,
    run: dict[str, Any],
    root: Path,
    skipped: list[dict[str, str]] | None = None,
    failures: list[dict[str, Any]] | None = None,
    templates: Path | None = None,
    extend: Callable[[Document], object] | None = None,
) -> list[str]:
    """Write the reports of a run; returns lines that say where they are, or what went wrong with one.

    skipped    tests that measured nothing, each with its reason
    failures   tests that failed: test, message, file, line
    templates  a folder of templates that extend ours
    extend     changes the document in place before the pages are rendered: the hook `pytest_lmeval_report`

    The numbers are safe before anything else is done: a hook or a page that fails costs only itself.
    """
    document = _document(records, run, root, skipped or [], failures or [])
    replace_text(folder / "metrics.json", _json(document))
    notes: list[str] = []
    if extend is not None:
        document = _extended(document, extend, folder, notes)
    try:
        history.append(folder, document)
    except OSError as error:
        notes.append(f"nothing could be added to {history.NAME} ({error})")
    written = ["metrics.json", *_pages(folder, document, templates, notes)]
    return [f"written to {_readable(folder)}: {', '.join(written)}", *notes, *github.marks(document, os.environ)]


def _document(
    records: list[dict[str, Any]], run: dict[str, Any], root: Path, skipped: list[Any], failures: list[Any]
) -> Document:
    return {
        "schema": SCHEMA,
        "run": {
            "id": uuid.uuid4().hex[:12],
            "started": datetime.datetime.fromtimestamp(run["started"], datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.time() - run["started"], 3),
            "command": shlex.join(["pytest", *map(str, run["command"])]),
            "exit_status": run["exit_status"],
        },
        "environment": environment.describe(
            root=root,
            device=", ".join(sorted({str(record["lm"]["device"]) for record in records})),
            threads=sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
            seed=0,
        ),
        "records": records,
        "skipped": skipped,
        "failures": failures,
        "sections": [],
    }


def _extended(document: Document, extend: Callable[[Document], object], folder: Path, notes: list[str]) -> Document:
    """The document as a project's hooks changed it, saved; or as it was, if one of them fails or makes something else of it."""
    copy = json.loads(json.dumps(document))
    try:
        extend(copy)
        _json(copy)  # numbers that are none are refused, not left out
        text = _json(complete(copy))
        pages.render("summary.md", copy)  # what no page can show is no document any more
    except Exception as error:  # noqa: BLE001 - a hook may raise anything
        notes.append(f"pytest_lmeval_report failed, and its changes were left out ({type(error).__name__}: {error})")
        return document
    if copy == document:
        return document
    replace_text(folder / "metrics.json", text)
    return json.loads(text)  # type: ignore[no-any-return]


def _pages(folder: Path, document: Document, templates: Path | None, notes: list[str]) -> list[str]:
    """Render and write the pages; returns the names of those that went well."""
    written = []
    for name in pages.PAGES:
        try:
            page = pages.render(name, document, folders=[folder], templates=templates)
            replace_text(folder / name, page)
            written.append(name)
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)  # that of an earlier run would pass for this one's
            again = f"python -m pytest_lmeval render {_readable(folder)}" + (f" --templates {templates}" if templates else "")
            notes.append(f"{name} was not rendered: {pages.where(error)}. All numbers are in metrics.json; then: {again}")
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


def _json(document: Document) -> str:
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _readable(folder: Path) -> str:
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
