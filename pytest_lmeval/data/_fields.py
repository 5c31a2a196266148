"""Make corpora of one text field of rows, a document each: `jsonl:PATH#FIELD`, and alike json, csv and parquet."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.data._formats import READERS
from pytest_lmeval.data._rows import Rows
from pytest_lmeval.errors import CorpusError


def documents_of(
    name: str, rows: Rows, field: str, *, data_dir: str | Path | None = None, as_stream: bool = False, end: str = ""
) -> Corpus:
    """The corpus of this name whose documents are a field of rows; `end` is added to each if rows are lines of one text."""

    def documents() -> Iterator[Document]:
        for place, row in rows.placed(data_dir):
            if not isinstance(text := row.get(field), str):
                there = f"there is {', '.join(row)}" if field not in row else f"it holds {repr(text)[:80]}"
                raise CorpusError(f"{place}: no text in field {field!r} ({there}).")
            yield Document(place, text + end)

    return Corpus(name, rows.split, documents, f"{rows.fingerprint(data_dir)}#{field}", as_stream=as_stream)


def _load(form: str, given: str, split: str) -> Corpus:
    """A document for each row of a file, or of SPLIT in a folder, from the field behind the # (default: text)."""
    path, _, field = given.partition("#")
    field = field or "text"
    return documents_of(f"{form}:{path}#{field}", Rows(f"{form}:{path}", split=split), field)


FILES = {form: functools.partial(_load, form) for form in READERS}
