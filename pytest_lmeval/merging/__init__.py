"""`lmeval merge`: join the output of the shards of a run into that of one run.

The numbers of the whole are computed from the examples and the sums of all shards, as one process computes them from its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_lmeval.merging import _folder as folder, _results as results, _shards as shards
from pytest_lmeval.report._render import page, write
from pytest_lmeval.report._terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output folder of each shard (--lmeval-shard I/N)")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="output folder of the whole")
    parser.add_argument("--templates", type=Path, help="folder of templates that extend ours block by block")


def main(options: argparse.Namespace) -> int:
    """The exit status is 1 if a measurement is not merged, since a shard has not finished it, or if a test of a shard failed.

    Raises MergeError, before anything is written, for folders that are not all shards of one run."""
    from pytest_lmeval.report import _pages as pages

    parts = shards.read(options.folders)
    to = folder.prepared(options.to, parts)
    merged = results.merged(parts, to)
    folder.join_files(parts, to)
    document = folder.document_of(parts, merged, to)
    shown = pages.with_sections(document, to)
    files = {name: page(name, shown, folders=[to], templates=options.templates) for name in pages.PAGES}
    write(to, files, [*document.problems])
    incomplete = f"; {len(merged.missing)} not, since a shard has not finished them" if merged.missing else ""
    say(f"{len(merged.records)} measurements of {len(parts)} shards are merged{incomplete}")
    say(f"now the tests decide: pytest --lmeval-dir {options.to} takes what is there, and measures only what is missing")
    return 1 if merged.missing or document.failures else 0
