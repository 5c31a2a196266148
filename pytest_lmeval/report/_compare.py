"""`lmeval compare`: show several runs side by side, in the terminal, as Markdown and as a page."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from msgspec.structs import replace

from pytest_lmeval.errors import DocumentError, nearest
from pytest_lmeval.records._document import NAME, NamedRun, RunDocument, load
from pytest_lmeval.records._measured import Record
from pytest_lmeval.report import _terminal as terminal
from pytest_lmeval.report._overview import overview
from pytest_lmeval.report._pages import with_sections
from pytest_lmeval.report._render import page, write

PAGES = {"comparison.md": "summary.md", "comparison.html": "report.html"}  # file -> its template


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.json files, or their folders")
    parser.add_argument("--sort", metavar="METRIC", help="the models with the best value of this metric come first")
    parser.add_argument("--to", type=Path, help="folder for comparison.md and comparison.html")
    parser.add_argument("--templates", type=Path, help="folder of templates that extend ours block by block")


def main(options: argparse.Namespace) -> int:
    """Write the pages if asked to, and print the tables. Raises DocumentError for a file or template with an error."""
    files = [file / NAME if file.is_dir() else file for file in options.metrics]
    documents = [load(file) for file in files]
    merged = merge(documents, labels_of(files))
    sort = check_metric(options.sort, merged.records) if options.sort else None
    if options.to:
        folders = [file.parent for file, document in zip(files, documents, strict=True) for _ in document.records]
        shown = with_sections(merged, None)
        chosen = {"folders": folders, "templates": options.templates, "sort": sort}
        write(options.to, {file: page(name, shown, **chosen) for file, name in PAGES.items()}, shown.problems)
    for line in terminal.lines(merged.records, width=shutil.get_terminal_size((120, 24)).columns, sort=sort):
        terminal.say(line)
    return 0


def merge(documents: Sequence[RunDocument], labels: Sequence[str]) -> RunDocument:
    """One document with the records of all runs; `runs` describes the runs, and each model's spec ends with its run's label.

    Gate results are left out, since each run has its own baseline.
    """
    labelled = list(zip(labels, documents, strict=True))
    records = [(record, f"{record.lm.spec} \u00b7 {label}") for label, document in labelled for record in document.records]
    return RunDocument(
        run=documents[0].run,
        environment=documents[0].environment,
        records=[replace(record, gate=None, lm=replace(record.lm, spec=spec)) for record, spec in records],
        skipped=list(chain.from_iterable(document.skipped for document in documents)),
        failures=list(chain.from_iterable(document.failures for document in documents)),
        sections=list(chain.from_iterable(document.sections for document in documents)),
        problems=list(chain.from_iterable(document.problems for document in documents)),
        runs=[
            NamedRun(label=label, headline=overview(document).headline, run=document.run, environment=document.environment)
            for label, document in labelled
        ],
    )


def labels_of(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different; numbers if two paths are equal.

    >>> labels_of([Path("base/metrics.json"), Path("new/metrics.json")]), labels_of([Path("a.json"), Path("x/b.json")])
    (['base', 'new'], ['a', 'b'])
    >>> labels_of([Path("a.json"), Path("a.json")])
    ['1', '2']
    """
    parts = [file.with_suffix("").parts for file in files]
    for wanted in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(own[-wanted:]) for own in parts]
        if len(set(ends)) == len(ends):
            return [name.removesuffix("/metrics") for name in ends]
    return [str(number) for number in range(1, len(files) + 1)]


def check_metric(name: str, records: Sequence[Record]) -> str:
    """The recorded name of a metric, which may have blanks for underscores. Raises DocumentError if no record has it."""
    known = {metric for record in records for metric in record.metrics}
    found = name.replace(" ", "_")
    if found not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise DocumentError(f"no run has a metric {name!r} to sort by.{nearest(found, known)} There are: {listed}.")
    return found
