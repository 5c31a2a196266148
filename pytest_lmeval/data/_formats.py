"""Read the rows of a file: JSON lines, a JSON list, CSV or Parquet, by the same rules in corpora and in tasks.

A row is what the file says, value by value: no type is guessed, and no other row is looked at. Text files are UTF-8, with or
without a byte order mark, with any line ends, and may be compressed by gzip. Blank lines are no rows. A file without rows
is an error, and so is anything that the format does not allow; the message names the file and the line (the first is 1), or
the row (the first is 0) where a format has no lines.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pytest_lmeval.errors import CorpusError, described
from pytest_lmeval.records._schema import DEEPEST, is_nested_deeper

BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
EDGE = 1 << 20  # bytes at each end of a file that its fingerprint reads
BATCH = 256  # rows of a Parquet file that are in memory at once

Row = dict[str, Any]


def rows(file: Path, form: str) -> Iterator[tuple[str, Row]]:
    """Yield each row of a file of the format, with the words that name its place: "questions.jsonl, line 3".

    Raises CorpusError for a file without rows, and for one that cannot be read.
    """
    place = ""
    try:
        for place, row in READERS[form](file):
            if not isinstance(row, dict):
                raise CorpusError(f"{place}: a row is an object with named fields, and this is {_shown(row)}.")
            yield place, row
    except (OSError, EOFError, zlib.error) as error:
        after = f"after {place}" if place else f"from {file}"
        raise CorpusError(f"nothing could be read {after} ({type(error).__name__}: {error}).") from error
    if not place:
        raise CorpusError(f"{file} holds no row, so there is nothing to read. Is it the right file, and was it written whole?")


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with binary(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield (place := f"{file}, line {number}"), _parsed(line, place)


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    with binary(file) as content:
        whole = content.read()
    if not whole.strip():
        return
    try:
        listed = _parsed(whole, str(file))
    except CorpusError as error:
        if "Extra data" in str(error):
            raise CorpusError(f"{error} If each line is an object of its own, the format is jsonl.") from None
        raise
    if not isinstance(listed, list):
        raise CorpusError(f"{file}: a file of json is a list of objects, [{{...}}, ...], and this is {_shown(listed)}.")
    for number, row in enumerate(listed):
        yield f"{file}, row {number}", row


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    """The rows after the header, each a text in every field."""
    csv.field_size_limit(max(csv.field_size_limit(), (1 << 31) - 1))  # a document may be longer than 128 KiB
    header, end = None, 0
    with binary(file) as content, io.TextIOWrapper(content, encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            for cells in reader:
                begin, end = end + 1, reader.line_num  # a field in quotes may contain line ends
                if not cells:
                    continue
                if header is None:
                    header = cells
                    if twice := [name for name, times in Counter(header).items() if times > 1]:
                        raise CorpusError(f"{file}, line {begin}: the field {twice[0]!r} stands twice in the header.")
                elif len(cells) != len(header):
                    raise CorpusError(
                        f"{file}, line {begin}: {len(cells)} values for the {len(header)} fields of the header "
                        f"({', '.join(header)}). A value with a comma or a line end stands in quotes."
                    )
                else:
                    yield f"{file}, line {begin}", dict(zip(header, cells, strict=True))
        except UnicodeDecodeError as error:
            raise not_utf8(f"{file}, after line {end}", error) from error
        except csv.Error as error:
            raise CorpusError(f"{file}, line {end + 1}: not CSV ({error}).") from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            if twice := [name for name, times in Counter(table.schema_arrow.names).items() if times > 1]:
                raise CorpusError(f"{file}: the field {twice[0]!r} stands twice.")
            for batch in table.iter_batches(BATCH):
                for row in batch.to_pylist():
                    yield f"{file}, row {number}", row
                    number += 1
    except (ValueError, ArithmeticError, NotImplementedError) as error:  # those of Arrow too
        raise CorpusError(f"{file} could not be read at row {number} ({described(error)}).") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
}
SUFFIXES = {".parquet": "parquet"} | {f".{form}{gz}": form for form in ("jsonl", "json", "csv") for gz in ("", ".gz")}
"""Ends of the names of files -> their format, in the order in which a folder is searched."""


def names_of(split: str, form: str | None = None) -> list[str]:
    """The names that the file of a split may have: of one format, or of any."""
    return [f"{split}{suffix}" for suffix, own in SUFFIXES.items() if form in (None, own)]


def form_of(file: Path) -> str:
    """The format that the name of a file says."""
    return next(form for suffix, form in SUFFIXES.items() if file.name.endswith(suffix))


@contextmanager
def binary(file: Path) -> Iterator[IO[bytes]]:
    """The content of a file of text after its byte order mark, decompressed if it is compressed."""
    with open(file, "rb") as raw:
        packed = raw.read(len(GZIP)) == GZIP
        raw.seek(0)
        content: IO[bytes] = gzip.open(raw) if packed else raw  # type: ignore[assignment]  # noqa: SIM115 - closed below
        with content:
            if content.read(len(BOM)) != BOM:
                content.seek(0)
            yield content


def existing_file(scheme: str, path: str, names: list[str]) -> Path:
    """The file `path`, or the first file of these names in the folder `path`. Raises CorpusError if there is none."""
    if not path:
        raise CorpusError(f"{scheme} names no file: write {scheme}:PATH.")
    file = Path(path).expanduser()
    files = [file / name for name in names] if file.is_dir() else [file]
    for found in files:
        if found.is_file():
            return found.resolve()
    looked = "" if file.is_absolute() else f" (looked from {Path.cwd()})"
    raise CorpusError(f"{scheme}:{path}: there is no file {' or '.join(map(str, files))}{looked}.")


def fingerprint(file: Path) -> str:
    """A hash of the size of the file, its modification time, and its first and last megabyte."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size} {file.stat().st_mtime_ns}".encode())
    with open(file, "rb") as content:
        digest.update(content.read(EDGE))
        content.seek(max(0, size - EDGE))
        digest.update(content.read(EDGE))
    return digest.hexdigest()


def not_utf8(where: str, error: UnicodeDecodeError) -> CorpusError:
    """The error for bytes that are no UTF-8."""
    return CorpusError(
        f"{where}: not UTF-8 text: byte {error.object[error.start]:#04x} ({error.reason}). Convert it first: replaced bytes "
        "would change what is scored."
    )


def _parsed(content: bytes, where: str) -> Any:
    try:
        if not is_nested_deeper(plain := STRICT.decode(content.decode())):
            return plain
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error
    except RecursionError:
        pass
    except ValueError as error:
        raise CorpusError(f"{where}: not JSON ({error}).") from error
    raise CorpusError(f"{where}: its values are nested more than {DEEPEST} deep. Is it the right file?")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the field {twice!r} stands twice, and only one of its values could be read")
    return found


def _float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is larger than any float")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON: a value that is missing is null, or its field is left out")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_no_constant)


def _shown(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False)[:40]}, of type {type(value).__name__}"
