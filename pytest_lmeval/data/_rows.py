"""Stream the rows of a dataset from the Hugging Face hub, a local mirror of it, or a file (see `data._formats`).

Only the rows that are read are downloaded, and a broken connection is opened again (see `models._hub`). A mirror
(`--lmeval-data DIR`) holds DIR/OWNER/NAME/CONFIG/SPLIT.parquet, .jsonl, .json or .csv; CONFIG is `default` for datasets without
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_lmeval.data import _formats as formats
from pytest_lmeval.data._formats import Row
from pytest_lmeval.errors import CorpusError, described
from pytest_lmeval.models._hub import HubCall

PARQUET = "refs/convert/parquet"  # the hub's conversion of datasets that are published as a script


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
        try:
            with HubCall():  # also between rows, since the next ones are read ahead
                for number, row in enumerate(self._from_hub()):
                    yield f"{self}, row {number}", row
        except CorpusError:
            raise
        except Exception as error:
            raise CorpusError(
                f"{self} could not be read{f' after row {number}' if number >= 0 else ''} ({described(error)}). It is streamed "
                "from the hub. Without a network, point --lmeval-data at a local mirror."
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

    def _from_hub(self) -> Iterable[Row]:
        import datasets

        split = self.split
        if self.revision == PARQUET:
            files = {split: f"{self.config}/{split}/*.parquet"}
            return datasets.load_dataset(self.name, data_files=files, split=split, revision=PARQUET, streaming=True)  # type: ignore[no-any-return]
        return datasets.load_dataset(self.name, self.config, split=split, revision=self.revision, streaming=True)  # type: ignore[no-any-return]
