"""Datasets of the Hugging Face hub, streamed row by row; a broken connection is taken up at the row where it broke.

A local mirror (`--lmeval-data DIR`) is read by the same code: DIR/OWNER/NAME/CONFIG/SPLIT.parquet or .jsonl, with
CONFIG `default` for datasets without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_lmeval.data.corpus import SPLITS, Corpus, CorpusError, Document

PARQUET = "refs/convert/parquet"  # the hub's own conversion, for datasets that are published as a script


@dataclass(frozen=True)
class Source:
    """Where a corpus lies and how it reads."""

    hub_id: str
    config: str | None = None
    field: str = "text"
    as_stream: bool = False
    end: str = ""  # what ends a row where rows are the lines of one text
    splits: tuple[str, ...] = SPLITS
    revision: str | None = None


KNOWN = {
    "wikitext-2": Source("Salesforce/wikitext", "wikitext-2-raw-v1", as_stream=True),
    "wikitext-103": Source("Salesforce/wikitext", "wikitext-103-raw-v1", as_stream=True),
    "ptb": Source("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", as_stream=True, end="\n", revision=PARQUET),
    "c4": Source("allenai/c4", "en", splits=("train", "validation")),
    "pile": Source("monology/pile-uncopyrighted"),
    "pg19": Source("emozilla/pg19"),
}

TRANSIENT = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "fsspec", "huggingface_hub")
ATTEMPTS = 6  # in a row without a single new row; the waits between them add up to about a minute


def load(name: str, split: str, *, data_dir: str | Path | None = None) -> Corpus:
    source = KNOWN.get(name) or _parse(name)
    if split not in source.splits:
        raise CorpusError(f"{name} has no split {split!r}; it has {', '.join(source.splits)}.")
    file = _mirrored(source, split, Path(data_dir).expanduser()) if data_dir is not None else None
    return Corpus(
        name,
        split,
        lambda: _documents(source, name, split, file),
        fingerprint=_fingerprint(source, split, file),
        as_stream=source.as_stream,
    )


def resilient(
    rows_from: Callable[[int], Iterator[Any]],
    *,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Any]:
    """The rows of `rows_from(0)`; after a broken connection those of `rows_from(n)`, n being the rows already had.

    Waits 1, 2, 4, ... seconds between attempts, and gives up after `attempts` in a row without a new row. A connection
    that never was is not tried again: the hub's own client has tried it for half a minute by then.
    """
    done = failed = 0
    while True:
        try:
            for row in rows_from(done):
                yield row
                done, failed = done + 1, 0
            return
        except Exception as error:
            failed += 1
            if not is_transient(error) or failed >= attempts or not done:
                raise
            sleep(2.0 ** (failed - 1))


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: the network failed, rather than the dataset's name or content."""
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # the hub has answered: only its own failures and its rate limit pass
        return status >= 500 or status == 429
    return isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in TRANSIENT


def _documents(source: Source, name: str, split: str, file: Path | None) -> Iterator[Document]:
    row = -1
    try:
        rows = resilient(lambda done: _rows(source, split, file, done))
        for row, content in enumerate(rows):
            text = content.get(source.field)
            if not isinstance(text, str):
                raise CorpusError(
                    f"{name}[{split}], row {row}: no text in field {source.field!r} (there is {', '.join(content)})."
                )
            yield Document(f"{split}/{row}", text + source.end)
    except CorpusError:
        raise
    except Exception as error:
        raise CorpusError(
            f"{name}[{split}] could not be read{f' after row {row}' if row >= 0 else ''} "
            f"({type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}). It is streamed from "
            + (f"{file}." if file else f"the hub ({source.hub_id}). Without a network, point --lmeval-data at a local mirror.")
        ) from error


def _rows(source: Source, split: str, file: Path | None, skip: int) -> Iterator[dict[str, Any]]:
    import datasets

    if file is not None:
        builder = "parquet" if file.suffix == ".parquet" else "json"
        rows = datasets.load_dataset(builder, data_files={split: str(file)}, split=split, streaming=True)
    elif source.revision == PARQUET:
        files = {split: f"{source.config}/{split}/*.parquet"}
        rows = datasets.load_dataset(source.hub_id, data_files=files, split=split, revision=PARQUET, streaming=True)
    else:
        rows = datasets.load_dataset(source.hub_id, source.config, split=split, streaming=True)
    return iter(rows.skip(skip) if skip else rows)


def _mirrored(source: Source, split: str, data_dir: Path) -> Path:
    folder = data_dir / source.hub_id / (source.config or "default")
    for suffix in (".parquet", ".jsonl"):
        if (file := folder / f"{split}{suffix}").is_file():
            return file.resolve()
    raise CorpusError(
        f"the local mirror {data_dir} does not hold {source.hub_id}: looked for {folder / split}.parquet and .jsonl. "
        "With --lmeval-data nothing is looked up on the hub."
    )


def _fingerprint(source: Source, split: str, file: Path | None) -> str:
    from pytest_lmeval.data import files

    if file is not None:
        return files.fingerprint(file)
    return f"{source.hub_id}@{source.revision or 'main'}/{source.config}/{split}#{source.field}"


def _parse(name: str) -> Source:
    """OWNER/NAME[:CONFIG][#FIELD]

    >>> _parse("allenai/c4:de#text").config
    'de'
    """
    name, _, field = name.partition("#")
    hub_id, _, config = name.partition(":")
    return Source(hub_id, config or None, field or "text")
