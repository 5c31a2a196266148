"""`lmeval render`: render the pages of a finished run again, or export its numbers in the format of a service."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_lmeval import registry
from pytest_lmeval.errors import DocumentError, LmevalError
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import NAME, RunDocument, load
from pytest_lmeval.records._journal import Journal
from pytest_lmeval.records._measured import Record
from pytest_lmeval.report import _pages as pages
from pytest_lmeval.report._terminal import say
from pytest_lmeval.report._write import replace_text

OWN = "pages"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("metrics", type=Path, help="a metrics.json, or its folder")
    parser.add_argument("--to", type=Path, help="output folder (default: that of metrics.json)")
    parser.add_argument("--templates", type=Path, help="folder of templates that extend ours block by block")
    formats = ", ".join(entry.name for entry in registry.entries("exporters"))
    parser.add_argument("--format", default=OWN, metavar="NAME", help=f"{OWN} (default), or the format of a service: {formats}")


def main(options: argparse.Namespace) -> int:
    """Raises DocumentError for a file or template with an error, and RegistryError for an unknown format."""
    export = None if options.format == OWN else registry.find("exporters", options.format)
    document = (from_journal(options.metrics) if options.metrics.is_dir() else None) or load(options.metrics)
    folder = options.metrics if options.metrics.is_dir() else options.metrics.parent
    if export is None:
        document = pages.with_sections(document, folder)
        files = {name: page(name, document, folders=[folder], templates=options.templates) for name in pages.PAGES}
    else:
        try:
            files = {
                file: content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
                for file, content in export(*_arguments(export, document, folder)).items()
            }
        except LmevalError:
            raise
        except Exception as error:  # another package's exporter may raise anything
            raise DocumentError(
                f"the export format {options.format!r} failed with {type(error).__name__}: {error}. It must be a function of a "
                "document, and if it likes of a `folder`, that returns the content of each file by its name."
            ) from error
    write(options.to or folder, files, document.problems)
    return 0


def _arguments(export: Callable[..., Any], document: RunDocument, folder: Path) -> list[Any]:
    """The document, and the folder with its files for an exporter that has a parameter for it."""
    return [document, folder] if "folder" in inspect.signature(export).parameters else [document]


def from_journal(folder: Path) -> RunDocument | None:
    """What the journal holds of a run that was killed, or still runs; None if the last run in the folder ended by itself."""
    records, problems = [], ["This run did not end: it was killed, or still runs. These are the results that its journal holds"]
    for plain in Journal(folder).unfinished():
        try:
            records.append(schema.convert(plain, Record))
        except ValueError as error:
            problems.append(f"a result in the journal cannot be read ({error})")
    if not records:
        return None
    if (folder / NAME).exists():
        problems.append(f"{NAME} is that of an earlier run")
    return RunDocument(records=records, problems=problems)


def page(name: str, document: RunDocument, **options: Any) -> str:
    """Render a page. Raises DocumentError with the line of a template that fails."""
    try:
        return pages.render(name, document, **options)
    except Exception as error:  # a template may raise anything
        raise DocumentError(f"{name} cannot be rendered: {pages.where(error)}") from error


def write(to: Path, files: dict[str, str], problems: list[str]) -> None:
    """Write files; print the problems and the names of the files. Raises DocumentError if a file cannot be written."""
    for problem in problems:
        say(problem)
    for name, text in files.items():
        try:
            replace_text(to / name, text)
        except OSError as error:
            raise DocumentError(f"{name} cannot be written to {to} ({error.strerror or error}).") from error
    if files:
        say(f"written to {to}: {', '.join(files)}")
