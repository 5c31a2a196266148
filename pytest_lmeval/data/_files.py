"""Read corpora from local files as needed: `text:PATH`, `jsonl:PATH#FIELD` and `tokens:PATH`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.errors import CorpusError

PART = 1 << 16  # characters of a text file that are tokenized together, up to the end of the line
EDGE = 1 << 20  # bytes at each end of a file that its fingerprint reads


def text(path: str, split: str) -> Corpus:
    """One text, in parts that end with a line, from a file, or from SPLIT.txt in a folder."""
    file = existing_file("text", path, f"{split}.txt")

    def documents() -> Iterator[Document]:
        with open(file, encoding="utf-8", newline="") as lines:
            try:
                while part := lines.read(PART):
                    yield Document(file.name, part + lines.readline())
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{file} is not UTF-8 text: byte {error.object[error.start]:#04x} ({error.reason}). Convert it first: "
                    "replaced bytes would change what is scored."
                ) from error

    return Corpus(f"text:{path}", split, documents, fingerprint(file), size=file.stat().st_size)


def jsonl(path: str, split: str) -> Corpus:
    """One document per line, from the given field."""
    path, _, field = path.partition("#")
    field = field or "text"
    file = existing_file("jsonl", path, f"{split}.jsonl")

    def documents() -> Iterator[Document]:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield Document(f"{file.name}:{number}", _field(line, field, f"{file}, line {number}"))

    return Corpus(f"jsonl:{path}#{field}", split, documents, fingerprint(file), as_stream=False)


def tokens(path: str, split: str) -> Corpus:
    """Ids [t], or frames of codes [t, k], from a memory-mapped .npy file."""
    import numpy as np

    file = existing_file("tokens", path, f"{split}.npy")
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CorpusError(f"{file} is no .npy file of token ids ({error}). Write one with numpy.save(path, ids).") from error
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        shape = list(ids.shape)
        raise CorpusError(f"{file} holds {ids.dtype} of shape {shape}; expected integers [ids] or [frames, codebooks].")

    def documents() -> Iterator[Document]:
        # mapped again for each reading, so that the pages of the last one are released
        yield Document(file.name, ids=np.load(file, mmap_mode="r", allow_pickle=False))

    return Corpus(f"tokens:{path}", split, documents, fingerprint(file), tokenized=True, size=len(ids))


def fingerprint(file: Path) -> str:
    """A hash of the size of the file, its modification time, and its first and last megabyte."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size} {file.stat().st_mtime_ns}".encode())
    with open(file, "rb") as content:
        digest.update(content.read(EDGE))
        content.seek(max(0, size - EDGE))
        digest.update(content.read(EDGE))
    return digest.hexdigest()


def existing_file(scheme: str, path: str, own: str) -> Path:
    """The file `path`, or the file `own` in the folder `path`. Raises CorpusError if there is none."""
    if not path:
        raise CorpusError(f"{scheme} names no file: write {scheme}:PATH.")
    file = Path(path).expanduser()
    file = file / own if file.is_dir() else file
    if not file.is_file():
        looked = "" if file.is_absolute() else f" (looked from {Path.cwd()})"
        raise CorpusError(f"{scheme}:{path}: there is no file {file}{looked}.")
    return file.resolve()


def _field(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{where}: not JSON in UTF-8 ({error}).") from error
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CorpusError(f"{where}: no text in field {field!r} (there is {there}).")
    if not value:
        raise CorpusError(f"{where}: the document is empty, so there is nothing to score. Remove the line.")
    return value
