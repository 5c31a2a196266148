"""Rows of a dataset, one after the other as they come: from the Hugging Face hub, from a local mirror of it, from a file.

    for row in Rows("nyu-mll/glue", "sst2", "validation").read(): ...

Nothing is downloaded whole: N rows of ten gigabytes cost N rows. A connection that breaks is taken up at the row where it
broke. A mirror (`--lmeval-data DIR`) is read by the same code: DIR/OWNER/NAME/CONFIG/SPLIT.parquet or .jsonl, CONFIG being
`default` for datasets without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import CorpusError

PARQUET = "refs/convert/parquet"  # the hub's own conversion, for datasets that are published as a script
SCHEMES = {"jsonl": ".jsonl", "parquet": ".parquet"}
TRANSIENT = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "fsspec", "huggingface_hub")
ATTEMPTS = 6  # in a row without a single new row; the waits between them add up to about a minute

AGAIN = 300.0  # seconds until a hub that was out of reach is tried again, since finding that out takes long

Row = dict[str, Any]


class _Hub:
    """When the hub was last found to be out of reach."""

    missed = -inf


@dataclass(frozen=True)
class Rows:
    """Where the rows of one split lie.

    name      OWNER/NAME of the hub, or `jsonl:PATH` or `parquet:PATH`: a file, or a folder with SPLIT.jsonl or SPLIT.parquet
    config    the hub's name for a part of the dataset
    split     as the hub calls it
    revision  of the dataset; the newest by default
    """

    name: str
    config: str | None = None
    split: str = "test"
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}{f':{self.config}' if self.config else ''}[{self.split}]"

    def of(self, split: str) -> Rows:
        """The rows of another split."""
        return replace(self, split=split)

    def read(self, data_dir: str | Path | None = None) -> Iterator[Row]:
        """The rows, in the dataset's order; a field that is null is left out of its row.

        A file of JSON lines whose lines have not the same fields is read with null for those that a line lacks, so null and
        missing cannot be told apart, and a text that is put together would hold the word "None". `row["field"]` raises
        KeyError for either, `row.get("field")` is None.

        Raises CorpusError where the rows are not there, and where one cannot be read.
        """
        file = self.file(data_dir)
        number = -1
        if file is None and (seconds := time.monotonic() - _Hub.missed) < AGAIN:
            raise CorpusError(
                f"{self} could not be read: the hub could not be reached {seconds:.0f} s ago, and it is tried again after "
                f"{AGAIN:.0f} s. Without a network, point --lmeval-data at a local mirror."
            )
        try:
            for number, row in enumerate(resilient(lambda done: self._from(file, done))):  # noqa: B007 - told in the error
                yield {name: value for name, value in row.items() if value is not None}
        except CorpusError:
            raise
        except Exception as error:
            if file is None and number < 0 and isinstance(error, ConnectionError):
                _Hub.missed = time.monotonic()
            raise CorpusError(
                f"{self} could not be read{f' after row {number}' if number >= 0 else ''} "
                f"({type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}). It is streamed from "
                + (f"{file}." if file else "the hub. Without a network, point --lmeval-data at a local mirror.")
            ) from error

    def fingerprint(self, data_dir: str | Path | None = None) -> str:
        """Changes when a local file does; of the hub, when another revision is asked for."""
        from pytest_lmeval.data import _files as files

        if (file := self.file(data_dir)) is not None:
            return files.fingerprint(file)
        return f"{self.name}@{self.revision or 'main'}/{self.config}/{self.split}"

    def file(self, data_dir: str | Path | None) -> Path | None:
        """The local file that is read; None for the hub."""
        scheme, _, path = self.name.partition(":")
        if scheme in SCHEMES:
            place = Path(path).expanduser()
            file = place / f"{self.split}{SCHEMES[scheme]}" if place.is_dir() else place
            if not file.is_file():
                raise CorpusError(
                    f"{self.name}: there is no file {file}" + ("." if file.is_absolute() else f" (looked from {Path.cwd()}).")
                )
            return file.resolve()
        if data_dir is None:
            return None
        data_dir = Path(data_dir).expanduser()
        folder = data_dir / self.name / (self.config or "default")
        for suffix in (".parquet", ".jsonl"):
            if (file := folder / f"{self.split}{suffix}").is_file():
                return file.resolve()
        raise CorpusError(
            f"the local mirror {data_dir} does not hold {self.name}: looked for {folder / self.split}.parquet and .jsonl. "
            "With --lmeval-data nothing is looked up on the hub."
        )

    def _from(self, file: Path | None, skip: int) -> Iterator[Row]:
        import datasets

        split = self.split
        if file is not None:
            builder = "parquet" if file.suffix == ".parquet" else "json"
            rows = datasets.load_dataset(builder, data_files={"rows": str(file)}, split="rows", streaming=True)
        elif self.revision == PARQUET:
            files = {split: f"{self.config}/{split}/*.parquet"}
            rows = datasets.load_dataset(self.name, data_files=files, split=split, revision=PARQUET, streaming=True)
        else:
            rows = datasets.load_dataset(self.name, self.config, split=split, revision=self.revision, streaming=True)
        return iter(rows.skip(skip) if skip else rows)


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
