"""Let tasks of lm_eval read their data from a mirror of the hub, and never elsewhere.

    dataset_path: OWNER/NAME, dataset_name: CONFIG          DIR/OWNER/NAME/CONFIG/SPLIT.jsonl, as of all tasks
    data_files: hf://datasets/OWNER/NAME/data/some.jsonl    DIR/OWNER/NAME/data/some.jsonl, a copy of the file
    dataset_path: OWNER/NAME, data_files: data/some.csv     DIR/OWNER/NAME/data/some.csv
    data_files: https://HOST/some.csv                       DIR/HOST/some.csv

A task that names files itself has them where its repository has them: several tasks share a split of one repository.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from pytest_lmeval.data import _formats as formats
from pytest_lmeval.errors import CorpusError

BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}  # format -> what reads it in `datasets`
PACKAGED = {*BUILDERS.values(), "text", "arrow"}  # that are no repositories
OF_HUB = ("revision", "token", "trust_remote_code")  # options that a file here does not need
HUB = re.compile(r"(?:hf://|https?://huggingface\.co/)datasets/([^/@]+/[^/@]+)(?:@[^/]+)?/(?:(?:resolve|raw|blob)/[^/]+/)?(.+)")
URL = re.compile(r"\w+://(.+?)(?:\?.*)?")


@contextlib.contextmanager
def mirrored(data_dir: str | Path | None) -> Iterator[None]:
    """While it lasts, datasets are read from a mirror, if there is one, and never looked up elsewhere."""
    import datasets

    if data_dir is None:
        yield
        return
    load = datasets.load_dataset
    root = Path(data_dir).expanduser()

    class Parts(datasets.DatasetDict):  # type: ignore[misc]
        """The splits of a mirror; one that it lacks is empty: lm_eval looks at the training split even where it shows none."""

        def __missing__(self, split: str) -> Any:
            return next(iter(self.values())).select([])

    def of_mirror(path: str, name: str | None = None, **options: Any) -> Any:
        if options.get("data_files"):
            return _of_files(load, root, path, name, options)
        if path in PACKAGED:
            return load(path, name, **options)
        folder = root / path / (name or "default")
        files = [file for file in sorted(folder.glob("*.*")) if file.name.endswith(tuple(formats.SUFFIXES))]
        if not files:
            raise CorpusError(f"the local mirror {root} does not hold {path}: {folder} has no file of rows.")
        parts = Parts({file.name.partition(".")[0]: _dataset_of(file) for file in files})
        return parts[options["split"]] if options.get("split") else parts

    with mock.patch.object(datasets, "load_dataset", of_mirror):
        yield


def _dataset_of(file: Path) -> Any:
    """The rows of a file as `datasets` has them."""
    import datasets

    if (form := formats.form_of(file)) == "parquet":
        import pyarrow.parquet

        return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.parquet.read_table(file)))
    return datasets.Dataset.from_list([row for _, row in formats.rows(file, form)])


def _of_files(load: Callable[..., Any], root: Path, path: str, name: str | None, options: dict[str, Any]) -> Any:
    """The dataset of files that the task itself names, read as it says: `datasets` knows its options."""
    found = _places(root, path, options["data_files"])
    first = found
    while not isinstance(first, str):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    if path not in PACKAGED:
        form = next((form for end, form in formats.SUFFIXES.items() if first.endswith(end)), None)
        if form is None:
            raise CorpusError(f"{first} has none of the endings {', '.join(formats.SUFFIXES)}, so nobody knows how to read it.")
        path = BUILDERS[form]
    kept = {option: value for option, value in options.items() if option not in OF_HUB}
    return load(path, name, **{**kept, "data_files": found})


def _places(root: Path, path: str, files: Any) -> Any:
    """Where the mirror has files: a name, or several, of each split. Raises CorpusError for one that it lacks."""
    if isinstance(files, Mapping):
        return {split: _places(root, path, some) for split, some in files.items()}
    if not isinstance(files, str):
        return [_places(root, path, one) for one in files]
    if (of_hub := HUB.fullmatch(files)) is not None:
        place = root / of_hub[1] / of_hub[2]
    elif (of_web := URL.fullmatch(files)) is not None:
        place = root / of_web[1]
    elif path in PACKAGED or Path(files).is_absolute():
        return files  # on this machine
    else:
        place = root / path / files
    if not place.is_file() and not any(root.glob(str(place.relative_to(root)))):
        raise CorpusError(
            f"the local mirror {root} does not hold {files}, which the task reads: {place} is not there. Copy it."
        )
    return str(place)
