"""`python -m pytest_lmeval compare`: several runs side by side, in the terminal, as Markdown and as a page."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.report import merge, terminal
from pytest_lmeval.report.document import load
from pytest_lmeval.report.render import page, say, write

PAGES = {"comparison.md": "summary.md", "comparison.html": "report.html"}  # what is written -> the template it is made of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.json files, or the folders they lie in")
    parser.add_argument("--sort", metavar="METRIC", help="the models with the best value of this metric come first")
    parser.add_argument("--to", type=Path, help="folder for comparison.md and comparison.html")
    parser.add_argument("--templates", type=Path, help="folder of templates that extend ours block by block")


def main(options: argparse.Namespace) -> int:
    """Returns the exit status: 2 where a file or a template is at fault."""
    try:
        compare(options)
    except DocumentError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def compare(options: argparse.Namespace) -> None:
    """Write the pages, if asked to, and print the tables. Raises DocumentError."""
    files = [file / "metrics.json" if file.is_dir() else file for file in options.metrics]
    documents = [load(file) for file in files]
    merged = merge.merge(documents, merge.labels_of(files))
    sort = merge.check_metric(options.sort, merged["records"]) if options.sort else None
    folders = [file.parent for file, document in zip(files, documents, strict=True) for _ in document["records"]]
    if options.to:
        chosen = {"folders": folders, "templates": options.templates, "sort": sort}
        write(options.to, {file: page(name, merged, **chosen) for file, name in PAGES.items()}, merged["problems"])
    for line in terminal.lines(merged["records"], width=shutil.get_terminal_size((120, 24)).columns, sort=sort):
        say(line)
