"""Read corpora from local files as needed: `text:PATH` and `tokens:PATH`."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.data._formats import binary, existing_file, fingerprint, not_utf8
from pytest_lmeval.errors import CorpusError, described

PART = 1 << 16  # characters of a text file that are read at once


def text(path: str, split: str) -> Corpus:
    """One text, in parts, from a file, or from SPLIT.txt in a folder."""
    file = existing_file("text", path, [f"{split}.txt", f"{split}.txt.gz"])

    def documents() -> Iterator[Document]:
        empty = True
        try:
            with binary(file) as content, io.TextIOWrapper(content, encoding="utf-8", newline="") as characters:
                while part := characters.read(PART):
                    yield Document(file.name, part)
                    empty = False
        except UnicodeDecodeError as error:
            raise not_utf8(str(file), error) from error
        except (OSError, EOFError, zlib.error) as error:
            raise CorpusError(f"{file} could not be read ({type(error).__name__}: {error}).") from error
        if empty:
            raise CorpusError(f"{file} is empty, so there is nothing to read. Is it the right file, and was it written whole?")

    packed = file.suffix == ".gz"
    return Corpus(f"text:{path}", split, documents, fingerprint(file), size=None if packed else file.stat().st_size)


def tokens(path: str, split: str) -> Corpus:
    """Ids [t], or frames of codes [t, k], from a memory-mapped .npy file."""
    import numpy as np

    file = existing_file("tokens", path, [f"{split}.npy"])
    try:
        ids = np.lib.format.open_memmap(file, mode="r")  # no other format, and no pickle
    except Exception as error:  # a damaged header can raise anything
        why = described(error)
        raise CorpusError(f"{file} is no .npy file of token ids ({why}). Write one with numpy.save(path, ids).") from error
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        shape = list(ids.shape)
        raise CorpusError(f"{file} holds {ids.dtype} of shape {shape}; expected integers [ids] or [frames, codebooks].")

    def documents() -> Iterator[Document]:
        # mapped again for each reading, so that the pages of the last one are released
        yield Document(file.name, ids=np.lib.format.open_memmap(file, mode="r"))

    return Corpus(f"tokens:{path}", split, documents, fingerprint(file), tokenized=True, size=len(ids))
