"""Turn arrays, tensors, lists and iterators into validated token ids, and cut streams of them into pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from pytest_lmeval.errors import NotFiniteError, StreamError
from pytest_lmeval.models._model import Codebooks, Model

SLICE = 1 << 16  # tokens of a large array that are read at once


@dataclass(frozen=True)
class Tokens:
    """Ids [n], or frames of codes [n, k], and the bytes of text that each stands for, [n] (zeros for bare ids)."""

    ids: np.ndarray
    widths: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.ids[part], self.widths[part])

    @staticmethod
    def joined(parts: Sequence[Tokens]) -> Tokens:
        return Tokens(np.concatenate([part.ids for part in parts]), np.concatenate([part.widths for part in parts]))


Source: TypeAlias = "Iterable[Any] | np.ndarray | Tensor"
"""A tensor, an array (memory-mapped ones are read as needed), a list, or an iterator of these or of `Tokens`."""


def tokens_of(source: Source | Tokens, books: Codebooks | None = None) -> Iterator[Tokens]:
    """The ids [n], or frames [n, k] of codebooks, as int64; a large or memory-mapped array in slices. Raises StreamError for
    anything else."""
    if isinstance(source, Tokens):
        yield source
        return
    ids = array_of(source)
    if ids is None:
        if not hasattr(source, "__iter__"):
            raise StreamError(f"a stream is a sequence of token ids; got the single id {source!r}.")
        atleast = np.atleast_2d if books else np.atleast_1d  # an iterator may give single ids, or single frames
        for piece in source:
            yield from tokens_of(piece if isinstance(piece, Tokens) else atleast(_array(piece)), books)
        return
    k = (len(books.sizes),) if books else ()
    if ids.ndim == 0 or ids.shape[1:] != k or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        wanted = f"frames of {k[0]} integer codes, [T, {k[0]}]" if k else "a row of integer token ids"
        raise StreamError(f"a stream is {wanted}; got shape {list(ids.shape)} of {ids.dtype}.")
    for begin in range(0, len(ids), SLICE):
        part = ids[begin : begin + SLICE].astype(np.int64)
        yield Tokens(part, np.broadcast_to(np.int64(0), len(part)))


def array_of(source: Any) -> np.ndarray | None:
    """The array that holds the ids; None for an iterator and for a scalar. Raises StreamError for anything else."""
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray | list | tuple | range):
        try:
            return np.asarray(source)
        except ValueError as error:
            raise StreamError(f"these are no token ids: {error}. Expected a row of ids, or frames of equal length.") from None
    if not hasattr(source, "__iter__") and not np.isscalar(source):
        raise StreamError(f"token ids are a tensor, an array, a list, or an iterator of these; got {type(source).__name__}.")
    return None


def _array(source: Any) -> np.ndarray:
    found = array_of(source)
    return np.asarray(source) if found is None else found


def ids_of(source: Any, name: str) -> np.ndarray:
    """The ids [n] of one text, int64, n >= 1. Raises StreamError, which names the text, for anything else."""
    ids = _array(source)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise StreamError(f"{name} is {list(ids.shape)} of {ids.dtype}; expected a row of integer token ids, at least one.")
    return ids.astype(np.int64, copy=False)


def overlapping(tokens: Iterable[Tokens], length: int, shared: int = 1, known: int = 1) -> Iterator[Tokens]:
    """Cut a stream into pieces of `length` that share `shared` tokens; the last may be shorter. Skip a remainder of only
    `known` tokens, at the beginning, or `shared`, later on.

    >>> [piece.ids.tolist() for piece in overlapping(tokens_of(range(6)), 3)]
    [[0, 1, 2], [2, 3, 4], [4, 5]]
    """
    held: Tokens | None = None
    for part in tokens:
        while len(part):
            missing = length - len(held or ())
            held, part = part[:missing] if held is None else Tokens.joined([held, part[:missing]]), part[missing:]
            if len(held) == length:
                yield held
                held, known = held[length - shared :], shared
    if held is not None and len(held) > known:
        yield held


def check_vocabulary(ids: np.ndarray, start: int, lm: Model) -> None:
    """Raise StreamError for the first of ids [n], or codes [n, k], outside the vocabulary; the first has position `start`."""
    if lm.classes:  # the logits are not over what it reads
        return
    books = lm.codebooks
    lowest, sizes = (-1 if books.gaps else 0, np.array(books.sizes)) if books else (0, np.array(lm.vocab_size))
    wrong = np.argwhere((ids < lowest) | (ids >= sizes))
    if not len(wrong):
        return
    index, *book = wrong[0]
    if books:
        raise StreamError(
            f"frame {start + index} of the stream has code {ids[index, book[0]]} in codebook {book[0]}, but those of {lm.spec} "
            f"are {lowest} to {sizes[book[0]] - 1} there. They were probably made for another model, or are in another order."
        )
    raise StreamError(
        f"token {start + index} of the stream has id {ids[index]}, but the vocabulary of {lm.spec} is 0 to "
        f"{lm.vocab_size - 1}. The text was probably tokenized for another model."
    )


@contextmanager
def naming(text: str) -> Iterator[None]:
    """Put the name of a text before the message of an error about it."""
    try:
        yield
    except (StreamError, NotFiniteError) as error:
        raise type(error)(f"{text}: {error}") from None
