"""`lmeval render`: the pages of a run that is over, anew, or its numbers in the format of a service."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_lmeval import registry
from pytest_lmeval.errors import DocumentError
from pytest_lmeval.records._document import RunDocument, load
from pytest_lmeval.report import _pages as pages
from pytest_lmeval.report._sections import with_sections
from pytest_lmeval.report._terminal import say
from pytest_lmeval.report._write import replace_text

OWN = "pages"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("metrics", type=Path, help="a metrics.json, or the folder it lies in")
    parser.add_argument("--to", type=Path, help="folder to write to (default: where metrics.json lies)")
    parser.add_argument("--templates", type=Path, help="folder of templates that extend ours block by block")
    formats = ", ".join(entry.name for entry in registry.entries("exporters"))
    parser.add_argument("--format", default=OWN, metavar="NAME", help=f"{OWN} (default), or what a service reads: {formats}")


def main(options: argparse.Namespace) -> int:
    """Raises DocumentError where a file or a template is at fault, and RegistryError for a format that is not registered."""
    export = None if options.format == OWN else registry.find("exporters", options.format)
    document = load(options.metrics)
    folder = options.metrics if options.metrics.is_dir() else options.metrics.parent
    if export is not None:
        files = _exported(export, document, options.format)
    else:
        document = with_sections(document, folder)
        files = {name: page(name, document, folders=[folder], templates=options.templates) for name in pages.PAGES}
    write(options.to or folder, files, document.problems)
    return 0


def _exported(export: Callable[[RunDocument], Any], document: RunDocument, name: str) -> dict[str, str]:
    """The files that an exporter makes. Raises DocumentError where it fails."""
    try:
        return {file: _text(content) for file, content in export(document).items()}
    except Exception as error:  # another package's may raise anything
        raise DocumentError(
            f"the export format {name!r} failed with {type(error).__name__}: {error}. It is to be a function of a document "
            "that returns the content of each file by its name."
        ) from error


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"


def page(name: str, document: RunDocument, **options: Any) -> str:
    """A page, or a DocumentError that names the line of the template at fault."""
    try:
        return pages.render(name, document, **options)
    except Exception as error:  # a template may raise anything
        raise DocumentError(f"{name} cannot be rendered: {pages.where(error)}") from error


def write(to: Path, files: dict[str, str], problems: list[str]) -> None:
    """Write files, and say what and where. Raises DocumentError where that is not possible."""
    for problem in problems:
        say(problem)
    for name, text in files.items():
        try:
            replace_text(to / name, text)
        except OSError as error:
            raise DocumentError(f"{name} cannot be written to {to} ({error.strerror or error}).") from error
    if files:
        say(f"written to {to}: {', '.join(files)}")
