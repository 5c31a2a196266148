"""Corpora of the Hugging Face hub: one text field of the rows of a dataset (see `data._rows`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from pytest_lmeval.data._corpus import SPLITS, Corpus
from pytest_lmeval.data._fields import documents_of
from pytest_lmeval.data._rows import PARQUET, Rows
from pytest_lmeval.errors import CorpusError


@dataclass(frozen=True)
class Source:
    """The rows of a corpus, and how to read them."""

    rows: Rows
    field: str = "text"
    as_stream: bool = False
    end: str = ""  # added to each row, if rows are lines of one text
    splits: tuple[str, ...] = SPLITS


KNOWN = {
    "wikitext-2": Source(Rows("Salesforce/wikitext", "wikitext-2-raw-v1"), as_stream=True),
    "wikitext-103": Source(Rows("Salesforce/wikitext", "wikitext-103-raw-v1"), as_stream=True),
    "ptb": Source(Rows("ptb-text-only/ptb_text_only", "penn_treebank", revision=PARQUET), "sentence", as_stream=True, end="\n"),
    "c4": Source(Rows("allenai/c4", "en"), splits=("train", "validation")),
    "pile": Source(Rows("monology/pile-uncopyrighted")),
    "pg19": Source(Rows("emozilla/pg19")),
}


def load(name: str, split: str, *, data_dir: str | Path | None = None) -> Corpus:
    """The corpus OWNER/NAME[:CONFIG][#FIELD]."""
    rows, _, field = name.partition("#")
    hub_id, _, config = rows.partition(":")
    return _read(name, Source(Rows(hub_id, config or None), field or "text"), split, data_dir)


def _known(name: str, rest: str, split: str, *, data_dir: str | Path | None = None) -> Corpus:
    """A dataset of the Hugging Face hub, read under a short name."""
    if rest:
        raise CorpusError(f"{name}:{rest}: {name} has no options. Any dataset is OWNER/NAME[:CONFIG][#FIELD].")
    return _read(name, KNOWN[name], split, data_dir)


CORPORA = {name: functools.partial(_known, name) for name in KNOWN}


def _read(name: str, source: Source, split: str, data_dir: str | Path | None) -> Corpus:
    if split not in source.splits:
        raise CorpusError(f"{name} has no split {split!r}; it has {', '.join(source.splits)}.")
    rows, end = source.rows.of(split), source.end
    return documents_of(name, rows, source.field, data_dir=data_dir, as_stream=source.as_stream, end=end)
