"""`lmeval compare`: several runs side by side, in the terminal, as Markdown and as a page."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from pytest_lmeval.records._document import NAME, load
from pytest_lmeval.report import _merge as merge, _terminal as terminal
from pytest_lmeval.report._render import page, write
from pytest_lmeval.report._sections import with_sections

PAGES = {"comparison.md": "summary.md", "comparison.html": "report.html"}  # what is written -> the template it is made of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.json files, or the folders they lie in")
    parser.add_argument("--sort", metavar="METRIC", help="the models with the best value of this metric come first")
    parser.add_argument("--to", type=Path, help="folder for comparison.md and comparison.html")
    parser.add_argument("--templates", type=Path, help="folder of templates that extend ours block by block")


def main(options: argparse.Namespace) -> int:
    """Write the pages, if asked to, and print the tables. Raises DocumentError where a file or a template is at fault."""
    files = [file / NAME if file.is_dir() else file for file in options.metrics]
    documents = [load(file) for file in files]
    merged = merge.merge(documents, merge.labels_of(files))
    sort = merge.check_metric(options.sort, merged.records) if options.sort else None
    if options.to:
        folders = [file.parent for file, document in zip(files, documents, strict=True) for _ in document.records]
        shown = with_sections(merged, None)
        chosen = {"folders": folders, "templates": options.templates, "sort": sort}
        write(options.to, {file: page(name, shown, **chosen) for file, name in PAGES.items()}, shown.problems)
    for line in terminal.lines(merged.records, width=shutil.get_terminal_size((120, 24)).columns, sort=sort):
        terminal.say(line)
    return 0
