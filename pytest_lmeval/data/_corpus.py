"""Define `Corpus`: documents of text or token ids under a name and a split, produced for each reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_lmeval.errors import CorpusError, lone_surrogate

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """A name and either text or token ids. A long document may come in several consecutive parts with the same name.

    Raises CorpusError for a text that is none, or that holds a lone surrogate.
    """

    name: str
    text: str = ""
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise CorpusError(
                f"{self.name}: a document is a text, and this one is {repr(self.text)[:80]}, of type "
                f"{type(self.text).__name__}."
            )
        if wrong := lone_surrogate(self.text):
            raise CorpusError(f"{self.name}: the text has {wrong}")


@dataclass(frozen=True, repr=False)
class Corpus:
    """Documents under a name and a split.

    documents       called once per reading; yields the documents in a fixed order
    as_stream       whether the documents are read as one text by default
    fingerprint     changes with the content: an interrupted reading resumes only on the same data, and never if it is empty
    tokenized       whether documents have ids (`tokens:PATH`) rather than text
    size            bytes of text, or number of ids, if known in advance: to estimate the remaining time
    entropy         expected loss of the best model, nats per byte; known for synthetic texts
    special_tokens  whether special tokens that are written in the text, "<|im_end|>", are read as control tokens, and not as
                    the characters that they are
    """

    name: str
    split: str
    documents: Callable[[], Iterator[Document]]
    fingerprint: str = ""
    as_stream: bool = True
    tokenized: bool = False
    size: int | None = None
    entropy: float | None = None
    special_tokens: bool = False

    @property
    def identity(self) -> str:
        """The fingerprint of the content as it is read; empty if it has none."""
        return f"{self.fingerprint} special tokens" if self.fingerprint and self.special_tokens else self.fingerprint

    def __repr__(self) -> str:
        return f"{self.name}[{self.split}]"
