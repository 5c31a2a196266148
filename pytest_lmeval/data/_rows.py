"""Stream the rows of a dataset from the Hugging Face hub, a local mirror of it, or a file (see `data._formats`).

Only the rows that are read are downloaded, and after a broken connection reading resumes at the next row. A mirror
(`--lmeval-data DIR`) holds DIR/OWNER/NAME/CONFIG/SPLIT.parquet, .jsonl, .json or .csv; CONFIG is `default` for datasets without
one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from pytest_lmeval.data import _formats as formats
from pytest_lmeval.data._formats import Row
from pytest_lmeval.errors import CorpusError

PARQUET = "refs/convert/parquet"  # the hub's conversion of datasets that are published as a script
TRANSIENT = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "fsspec", "huggingface_hub")
ATTEMPTS = 6  # without a new row; the waits between them add up to half a minute
AGAIN = 300.0  # seconds until an unreachable hub is tried again, since each attempt takes long


@dataclass(frozen=True)
class Rows:
    """The source of the rows of one split.

    name      OWNER/NAME of the hub, or FORMAT:PATH with the format jsonl, json, csv or parquet: a file, or a folder with
              SPLIT.jsonl and so on
    config    a configuration of the dataset
    split     its name on the hub
    revision  of the dataset; default: the newest
    """

    name: str
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    _hub_unreachable_at: ClassVar[float] = -inf  # `time.monotonic`

    def __str__(self) -> str:
        return f"{self.name}{f':{self.config}' if self.config else ''}[{self.split}]"

    @property
    def _scheme(self) -> str | None:
        """The format of the file that `name` names; None for a dataset."""
        scheme = self.name.partition(":")[0]
        return scheme if scheme in formats.READERS else None

    def of(self, split: str) -> Rows:
        """The rows of another split."""
        return replace(self, split=split)

    def read(self, data_dir: str | Path | None = None) -> Iterator[Row]:
        """Yield the rows in the order of the dataset, without fields that are null.

        Parquet and the hub have null for fields that a row lacks, so null and missing are the same: `row["field"]` raises
        KeyError (a prompt would otherwise contain "None"), `row.get("field")` is None.

        Raises CorpusError if the rows do not exist or one cannot be read.
        """
        return (row for _, row in self.placed(data_dir))

    def placed(self, data_dir: str | Path | None = None) -> Iterator[tuple[str, Row]]:
        """The same, each row with the words that name its place in the file or the dataset."""
        file = self.file(data_dir)
        for place, row in self._of_hub() if file is None else formats.rows(file, self._scheme or formats.form_of(file)):
            yield place, {name: value for name, value in row.items() if value is not None}

    def _of_hub(self) -> Iterator[tuple[str, Row]]:
        number = -1
        if (seconds := time.monotonic() - Rows._hub_unreachable_at) < AGAIN:
            raise CorpusError(
                f"{self} could not be read: the hub could not be reached {seconds:.0f} s ago, and it is tried again after "
                f"{AGAIN:.0f} s. Without a network, point --lmeval-data at a local mirror."
            )
        try:
            for number, row in enumerate(resilient(self._from)):
                yield f"{self}, row {number}", row
        except CorpusError:
            raise
        except Exception as error:
            if number < 0 and isinstance(error, ConnectionError):
                Rows._hub_unreachable_at = time.monotonic()
            raise CorpusError(
                f"{self} could not be read{f' after row {number}' if number >= 0 else ''} "
                f"({type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}). It is streamed from the hub. "
                "Without a network, point --lmeval-data at a local mirror."
            ) from error

    def fingerprint(self, data_dir: str | Path | None = None) -> str:
        """A value that changes with the local file, or, for the hub, with the requested revision."""
        if (file := self.file(data_dir)) is not None:
            return formats.fingerprint(file)
        return f"{self.name}@{self.revision or 'main'}/{self.config}/{self.split}"

    def file(self, data_dir: str | Path | None) -> Path | None:
        """The local file; None for the hub. Raises CorpusError if it does not exist."""
        if self._scheme:
            path = self.name.partition(":")[2]
            return formats.existing_file(self._scheme, path, formats.names_of(self.split, self._scheme))
        if data_dir is None:
            return None
        data_dir = Path(data_dir).expanduser()
        folder = data_dir / self.name / (self.config or "default")
        for name in formats.names_of(self.split):
            if (file := folder / name).is_file():
                return file.resolve()
        raise CorpusError(
            f"the local mirror {data_dir} does not hold {self.name}: looked for {folder / self.split} with the ends "
            f"{', '.join(formats.SUFFIXES)}. With --lmeval-data nothing is looked up on the hub."
        )

    def _from(self, skip: int) -> Iterator[Row]:
        import datasets

        split = self.split
        if self.revision == PARQUET:
            files = {split: f"{self.config}/{split}/*.parquet"}
            rows = datasets.load_dataset(self.name, data_files=files, split=split, revision=PARQUET, streaming=True)
        else:
            rows = datasets.load_dataset(self.name, self.config, split=split, revision=self.revision, streaming=True)
        return iter(rows.skip(skip) if skip else rows)


def resilient(rows_from: Callable[[int], Iterator[Any]], *, sleep: Callable[[float], None] = time.sleep) -> Iterator[Any]:
    """Yield the rows of `rows_from(0)`; after a broken connection, those of `rows_from(number of rows so far)`.

    Waits 1, 2, 4, ... seconds between attempts, and gives up after ATTEMPTS without a new row. Does not try again if there
    was no row at all, since the client of the hub has tried for half a minute by then.
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
            if not is_transient(error) or failed >= ATTEMPTS or not done:
                raise
            sleep(2.0 ** (failed - 1))


def is_transient(error: BaseException) -> bool:
    """Whether the network failed, rather than the name or the content of the dataset."""
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # an answer of the hub: server errors and the rate limit are transient
        return status >= 500 or status == 429
    return isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in TRANSIENT
