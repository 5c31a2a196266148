"""`lmeval push`: send a model, the record and the report of a run to a repository of the Hugging Face hub.

What is sent is shown by `--dry-run`. It is sent in parts, each a commit of its own; the same command goes on where it was
interrupted, since it sends only what the hub does not have. The token is the one that huggingface_hub finds (HF_TOKEN, or that
of `hf auth login`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_lmeval.errors import ArgumentError
from pytest_lmeval.report._terminal import say
from pytest_lmeval.report._words import size_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of a run")
    parser.add_argument("repository", metavar="OWNER/NAME", help="model repository; one that does not exist is created")
    parser.add_argument("--model", metavar="KEY", help="folder below DIR/models whose weights are sent (default: the only one)")
    parser.add_argument("--no-model", action="store_true", help="send no weights")
    parser.add_argument("--no-report", action="store_true", help="send no report.html, which shows questions and answers")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="TASK=DATASET[:ID]",
        help="write an entry below .eval_results: the task is this registered benchmark of the hub (ID: its task, by default "
        "`default`); repeatable",
    )
    parser.add_argument("--metric", action="append", default=[], metavar="TASK=NAME", help="of its entry (default: the first)")
    parser.add_argument("--percent", action="append", default=[], metavar="TASK", help="whose leaderboard counts in percent")
    parser.add_argument("--lm", metavar="SPEC", help="the model whose results are written, where there are several")
    parser.add_argument("--source-url", metavar="URL", help="where the entries say that the evaluation is found")
    parser.add_argument("--model-index", action="store_true", help="also write the older model-index into README.md")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--create-pr", action="store_true", help="open a pull request")
    where.add_argument("--revision", metavar="REV", help="branch, or pull request (refs/pr/N) to go on with (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")


def main(options: argparse.Namespace) -> int:
    """Raises ArgumentError, DocumentError or UnreadableError for what cannot be sent; HubError if the hub refuses, or is not
    reached."""
    from pytest_lmeval.pushing import _contents as contents, _results as results, _upload as upload

    owner, slash, name = options.repository.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise ArgumentError(f"{options.repository!r} is no repository of the hub. Give OWNER/NAME.")
    document, files = contents.record_of(options.folder, report=not options.no_report)
    trained = None if options.no_model else contents.model_of(options.folder, options.model)
    if trained is not None:
        files += contents.files_of(trained, options.max_shard_size)
    scores = results.scores_of(document, options, contents.fingerprint_of(trained))
    files += results.entry_files(scores, document, options.source_url)
    card = results.card(name, scores) if options.model_index and scores else None
    if options.model_index and not scores:
        raise ArgumentError("--model-index writes the results of --benchmark TASK=DATASET, and there is none. Name one.")
    for file in files:
        say(f"{size_of(file.size):>10}  {file.path}{f'  ({file.note})' if file.note else ''}")
    if card is not None:
        say(f"{size_of(len(card(None).encode())):>10}  README.md  (model-index; merged into that of the repository)")
    if options.dry_run:
        total = size_of(sum(file.size for file in files))
        say(f"{total} in {len(files) + (card is not None)} files for {options.repository}: a dry run, nothing is sent")
        return 0
    where = upload.Place(options.repository, options.revision, options.create_pr, options.private)
    message = f"Results of pytest-lmeval, run {document.run.id or 'without a name'}"
    upload.send(files, where, card=card, message=message, show=say)
    return 0
