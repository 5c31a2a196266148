"""The file of units: what a reading summed up over each document, or each block of a stream, one JSON object a line.

Two readings are compared document by document, so each is named by what it holds and not by its place: a document by its text,
a block by the whole text, and by the tokens and bytes of it that it covers. What another tokenizer cuts elsewhere is another
block. Nothing here depends on the chunk size.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Unit
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.scoring._loss_accumulator import BYTES, HITS, NATS, TOKENS, LossAccumulator

COLUMNS = {"tokens": TOKENS, "nats": NATS, "bytes": BYTES, **{f"top{k}": column for k, column in HITS.items()}}


def units_of(reading: LossAccumulator) -> list[Unit]:
    """The units that hold a target, in order: sums of tokens, nats, bytes, and targets among the first choices."""
    ids = reading.documents if reading.by_document else _blocks(reading)
    return [
        Unit(name, {column: _plain(unit[index]) for column, index in COLUMNS.items()})
        for name, unit in zip(ids, reading.units, strict=True)
        if unit[TOKENS]
    ]


def write_units(path: str | Path, reading: LossAccumulator) -> None:
    """Write the units to a file, in one move."""
    with replacing(Path(path)) as new:
        new.write_text("".join(map(schema.line_of, units_of(reading))), encoding="utf-8")


def _blocks(reading: LossAccumulator) -> list[str]:
    sums = np.array(reading.units)[:, [TOKENS, BYTES]].astype(int)
    begins = np.cumsum(sums, axis=0) - sums
    (text,) = reading.documents
    return [_id(f"{text} {begin.tolist()} {size.tolist()}") for begin, size in zip(begins, sums, strict=True)]


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else float(value)


def _id(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]
