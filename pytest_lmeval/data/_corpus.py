"""A corpus: named text (or token ids) in documents, read as often as wanted, never held whole.

    corpus = Corpus("notes", "test", documents=lambda: iter([Document("a", "To be"), ...]))

A corpus is a value: where it came from, how its documents are produced, and how it is
meant to be read - as one endless stream (a book, a dump) or document by document (web pages).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """One document: its name (stable between runs) and either its text or its token ids.

    A long document may arrive in several consecutive parts with the same name.
    """

    name: str
    text: str = ""
    ids: np.ndarray | None = None


@dataclass(frozen=True, repr=False)
class Corpus:
    """Documents under a name and a split.

    documents    called once per reading; yields the documents in a fixed order
    as_stream    whether the documents follow one another as one text by default
    fingerprint  changes when the content does: an interrupted reading is only taken up on the same data, and never if empty
    tokenized    whether documents carry ids (`tokens:PATH`) rather than text
    size         bytes of text, or number of ids, if it is known before reading: for the time that is left
    entropy      nats a byte that the best model pays for the whole, on average over such texts; known of synthetic ones
    """

    name: str
    split: str
    documents: Callable[[], Iterator[Document]]
    fingerprint: str = ""
    as_stream: bool = True
    tokenized: bool = False
    size: int | None = None
    entropy: float | None = None

    def __repr__(self) -> str:
        return f"{self.name}[{self.split}]"
