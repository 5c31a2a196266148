"""Write the output folder of merged shards: a journal whose results a run takes, the files beside it, and the document."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pytest_lmeval.errors import DocumentError, MergeError, some
from pytest_lmeval.laws._evidence import join_files as join_evidence
from pytest_lmeval.merging._results import Merged
from pytest_lmeval.merging._shards import Shard
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import NAME, RunDocument, dump, load
from pytest_lmeval.records._journal import ANSWERS, MERGED, NAME as JOURNAL
from pytest_lmeval.records._replacing import inside, replacing
from pytest_lmeval.records._secrets import without_secrets
from pytest_lmeval.report._write import replace_text


def prepared(to: Path, shards: Sequence[Shard]) -> Path:
    """The folder, which is empty, or holds merged results, that are replaced. Raises MergeError for one with anything else."""
    if any(to.resolve() == shard.folder.resolve() for shard in shards):
        raise MergeError(f"--to {to} is the folder of a shard. Name another one: the shards stay as they are.")
    journal = to / JOURNAL
    try:
        is_merged = journal.exists() and journal.read_bytes().startswith(MERGED)
        if not is_merged and to.exists() and any(to.iterdir()):
            what = "the results of a run" if journal.exists() else "files that no merge wrote"
            raise MergeError(f"--to {to} holds {what}, which would be lost. Name another folder, that is empty or new.")
        to.mkdir(parents=True, exist_ok=True)
        journal.write_bytes(MERGED + b"\n")  # from here on it holds merged results, whatever happens
        for name in (ANSWERS, "examples", "certificates"):
            shutil.rmtree(to / name, ignore_errors=True)
    except OSError as error:
        raise MergeError(f"nothing can be written to --to {to} ({error.strerror or error}).") from error
    return to


def join_files(shards: Sequence[Shard], to: Path) -> None:
    """Join what the shards keep for later runs: answers, what was tried of laws, and counterexamples."""
    named: dict[str, list[Path]] = defaultdict(list)
    for shard in shards:
        for pattern in (f"{ANSWERS}/*.jsonl", "certificates/*.json", "counterexamples.jsonl"):
            for file in sorted(shard.folder.glob(pattern)):
                with suppress(OSError):
                    named[str(file.relative_to(shard.folder))].append(inside(shard.folder, file.relative_to(shard.folder)))
    for name, files in named.items():
        if name.startswith("certificates"):
            join_evidence(files, to / name)
            continue
        with replacing(to / name) as new, open(new, "wb") as output:
            for file in files:
                with open(file, "rb") as source:
                    shutil.copyfileobj(source, output)


def document_of(shards: Sequence[Shard], merged: Merged, to: Path) -> RunDocument:
    """The document of the merged run, and the journal with its results, both written."""
    documents = []
    for shard in shards:
        with suppress(DocumentError):  # it was killed before it wrote one
            documents.append(load(shard.folder))
    failures = {(one.test, one.message): one for document in documents for one in document.failures}
    known = {record.test for record in merged.records.values()}
    skipped = {one.test: one for document in documents for one in document.skipped if one.test not in known}
    problems = [
        f"{what}: not merged, since shard{'s' * (len(lacking) > 1)} {some(lacking, 20)} did not finish it"
        for what, lacking in merged.missing.items()
    ]
    document = RunDocument(
        records=[*merged.records.values()],
        failures=[*failures.values()],
        skipped=[*skipped.values()],
        problems=problems,
    )
    if documents:
        first = documents[0]
        document.environment = first.environment
        document.run = schema.convert({**schema.to_plain(first.run), "exit_status": None}, type(first.run))
    lines = [
        json.dumps({"event": "result", "key": key, "record": without_secrets(schema.to_plain(record))}, allow_nan=False)
        for key, record in merged.records.items()
    ]
    replace_text(to / NAME, dump(document))
    replace_text(to / JOURNAL, "\n".join([MERGED.decode(), *lines, MERGED.decode(), ""]))
    return document
