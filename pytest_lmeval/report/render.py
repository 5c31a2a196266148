"""`python -m pytest_lmeval render`: the pages of a run that is over, anew, or its numbers in the format of a service."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.report import pages
from pytest_lmeval.report.document import load
from pytest_lmeval.report.formats import FORMATS
from pytest_lmeval.report.write import replace_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("metrics", type=Path, help="a metrics.json, or the folder it lies in")
    parser.add_argument("--to", type=Path, help="folder to write to (default: where metrics.json lies)")
    parser.add_argument("--templates", type=Path, help="folder of templates that extend ours block by block")
    parser.add_argument(
        "--format", choices=("pages", *FORMATS), default="pages", help="pages (default), or what a service reads"
    )


def main(options: argparse.Namespace) -> int:
    """Returns the exit status: 2 where a file or a template is at fault."""
    try:
        document = load(options.metrics)
        folder = options.metrics if options.metrics.is_dir() else options.metrics.parent
        if options.format != "pages":
            files = {name: json.dumps(make(document), indent=1) + "\n" for name, make in FORMATS[options.format].items()}
        else:
            files = {name: page(name, document, folders=[folder], templates=options.templates) for name in pages.PAGES}
        write(options.to or folder, files, document["problems"])
    except DocumentError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def page(name: str, document: dict[str, Any], **options: Any) -> str:
    """A page, or a DocumentError that names the line of the template at fault."""
    try:
        return pages.render(name, document, **options)
    except Exception as error:  # a template may raise anything
        raise DocumentError(f"{name} cannot be rendered: {pages.where(error)}") from error


def write(to: Path, files: dict[str, str], problems: list[str]) -> None:
    """Write files, and say what and where. Raises DocumentError where that is not possible."""
    for problem in problems:
        say(f"left out: {problem}")
    for name, text in files.items():
        try:
            replace_text(to / name, text)
        except OSError as error:
            raise DocumentError(f"{name} cannot be written to {to} ({error.strerror or error}).") from error
    if files:
        say(f"written to {to}: {', '.join(files)}")


def say(line: str) -> None:
    """Print, whatever the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, errors="backslashreplace").decode(encoding))
