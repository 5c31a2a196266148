"""Corpora in local files: `text:PATH`, `jsonl:PATH#FIELD` and `tokens:PATH`. All are read as they are needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.errors import CorpusError

PART = 1 << 16  # characters of a text file that are tokenized together; cut at ends of lines
EDGE = 1 << 20  # bytes at either end of a file that its fingerprint reads


def text(path: str, split: str) -> Corpus:
    """One text, in parts that end with a line. In a folder: the file of the split, SPLIT.txt."""
    file = _file("text", path, f"{split}.txt")

    def documents() -> Iterator[Document]:
        with open(file, encoding="utf-8", newline="") as lines:
            try:
                while part := lines.read(PART):
                    yield Document(file.name, part + lines.readline())
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{file} is not UTF-8 text: byte {error.object[error.start]:#04x} ({error.reason}). Convert it first; "
                    "bytes that are skipped or replaced would be scored as something else."
                ) from error

    return Corpus(f"text:{path}", split, documents, fingerprint(file), size=file.stat().st_size)


def jsonl(path: str, split: str) -> Corpus:
    """One document a line, in the named field."""
    path, _, field = path.partition("#")
    field = field or "text"
    file = _file("jsonl", path, f"{split}.jsonl")

    def documents() -> Iterator[Document]:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield Document(f"{file.name}:{number}", _field(line, field, f"{file}, line {number}"))

    return Corpus(f"jsonl:{path}#{field}", split, documents, fingerprint(file), as_stream=False)


def tokens(path: str, split: str) -> Corpus:
    """Ids [T], or frames of codes [T, k], from a .npy file, memory-mapped: a slice is read when it is scored."""
    import numpy as np

    file = _file("tokens", path, f"{split}.npy")
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CorpusError(f"{file} is no .npy file of token ids ({error}). Write one with numpy.save(path, ids).") from error
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise CorpusError(
            f"{file} holds {ids.dtype} of shape {list(ids.shape)}; token ids are one row of integers, and frames of codes are "
            "integers [frames, codebooks]."
        )

    def documents() -> Iterator[Document]:
        # mapped anew for each reading, so that pages read before do not stay with the process
        yield Document(file.name, ids=np.load(file, mmap_mode="r", allow_pickle=False))

    return Corpus(f"tokens:{path}", split, documents, fingerprint(file), tokenized=True, size=len(ids))


def fingerprint(file: Path) -> str:
    """A hash of the file's size, of when it was last written, and of its first and last megabyte."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size} {file.stat().st_mtime_ns}".encode())
    with open(file, "rb") as content:
        digest.update(content.read(EDGE))
        content.seek(max(0, size - EDGE))
        digest.update(content.read(EDGE))
    return digest.hexdigest()


def _file(scheme: str, path: str, own: str) -> Path:
    """The file that the path names; in a folder, the split's `own`."""
    if not path:
        raise CorpusError(f"{scheme} names no file: write {scheme}:PATH.")
    file = Path(path).expanduser()
    file = file / own if file.is_dir() else file
    if not file.is_file():
        raise CorpusError(
            f"{scheme}:{path}: there is no file {file}" + (f" (looked from {Path.cwd()})." if not file.is_absolute() else ".")
        )
    return file.resolve()


def _field(line: bytes, field: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{place}: not JSON in UTF-8 ({error}).") from error
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CorpusError(f"{place}: no text in field {field!r} (there is {there}).")
    if not value:
        raise CorpusError(f"{place}: the document is empty; an empty document has nothing to score. Remove the line.")
    return value
