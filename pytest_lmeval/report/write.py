"""Writes what a run leaves behind: metrics.json first, then the pages that are rendered from it."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from pytest_lmeval.report import pages
from pytest_lmeval.results import environment, history
from pytest_lmeval.results.record import SCHEMA
from pytest_lmeval.results.replacing import replacing


def reports(
    folder: Path, records: list[dict[str, Any]], *, run: dict[str, Any], root: Path, skipped: list[dict[str, str]] | None = None
) -> list[str]:
    """Write the reports of a run; returns lines that say where they are, or what went wrong with one.

    skipped  tests that measured nothing, each with its reason

    The numbers are safe before anything is rendered: a page that fails costs only itself.
    """
    document = {
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
        "skipped": skipped or [],
    }
    replace_text(folder / "metrics.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    history.append(folder, document)
    written = ["metrics.json"]
    for name, render in pages.PAGES.items():
        try:
            replace_text(folder / name, render(document))
            written.append(name)
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            written.append(f"{name} was not rendered ({type(error).__name__}: {error})")
    return [f"written to {_readable(folder)}: {', '.join(written)}"]


def replace_text(path: Path, text: str) -> None:
    """Write a file in one move."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def _readable(folder: Path) -> str:
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
