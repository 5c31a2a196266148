"""Tokenize documents, with the number of bytes of each token: bits per byte counts those of the tokens that were scored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

import numpy as np

from pytest_lmeval.data import corpus as named
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.engine._tokens import Tokens, array_of, tokens_of
from pytest_lmeval.errors import CorpusError, StreamError
from pytest_lmeval.models._model import Model


def as_corpus(source: Corpus | str | Iterable[Any]) -> Corpus:
    """A corpus as it is, or by its name; token ids (tensor, array, list, range, iterator of arrays) as a corpus of one
    document. An iterator can be read once and is not stored. Raises RegistryError and CorpusError for anything else."""
    if isinstance(source, Corpus):
        return source
    if isinstance(source, str):
        return named(source)
    if not hasattr(source, "__iter__"):
        help_ = f' A file is named as "text:{source}".' if isinstance(source, os.PathLike) else ""
        raise CorpusError(
            f'a text is a Corpus, the name of one, such as "stdlib", or token ids (a tensor, an array, a list, or an iterator '
            f"of these); got {source!r}, of type {type(source).__name__}.{help_}"
        )
    if (ids := array_of(source)) is not None:
        digest = hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()
        return Corpus("ids", "test", lambda: iter([Document("ids", ids=ids)]), digest, tokenized=True, size=len(ids))
    arrays: Iterable[Any] = source
    parts = (Document("ids", ids=part) for part in arrays)
    return Corpus("ids", "test", lambda: parts, "", tokenized=True)


def sequences(
    lm: Model, corpus: Corpus, *, by_document: bool, limit: int | None = None, tokens: int | None = None, rolling: bool = False
) -> Iterator[TokenReader]:
    """Yield a reader for each document of a corpus, or one for all documents as one stream.

    limit    most documents
    tokens   most tokens of each sequence
    rolling  begin texts and tokenize whole documents as lm-evaluation-harness does (see `beginning`)
    """
    documents = corpus.documents()
    if not by_document:
        yield TokenReader(lm, islice(documents, limit), limit=tokens, rolling=rolling)
        return
    for name, parts in islice(groupby(documents, key=attrgetter("name")), limit):
        whole = rolling and not corpus.tokenized
        document = [Document(name, "".join(part.text for part in parts))] if whole else parts
        yield TokenReader(lm, document, limit=tokens, rolling=rolling)


class TokenReader:
    """Iterate over the tokens of consecutive documents as one stream, after the beginning-of-sequence token if there is one.

    limit    end before this token
    rolling  begin the text as lm-evaluation-harness does (see `beginning`)
    skip     begin with this token of the stream
    content  a hash of the text (or the ids) so far, including what was skipped

    For a model with several codebooks, a token is a frame: ids are [n, k].
    """

    def __init__(self, lm: Model, documents: Iterable[Document], *, limit: int | None = None, rolling: bool = False) -> None:
        self._lm, self._documents, self._limit, self._rolling = lm, documents, limit, rolling
        self.skip = 0
        self.content = hashlib.sha256()

    def __iter__(self) -> Iterator[Tokens]:
        at = 0
        for part in self._encoded():
            end = at + len(part) if self._limit is None else min(at + len(part), self._limit)
            if (begin := max(at, self.skip)) < end:
                yield part[begin - at : end - at]
            at += len(part)
            if end == self._limit:
                return

    def _encoded(self) -> Iterator[Tokens]:
        tokenizer, begun = self._lm.tokenizer, False
        for document in self._documents:
            if document.ids is not None:
                try:
                    for part in tokens_of(iter([document.ids]), self._lm.codebooks):
                        self.content.update(part.ids.tobytes())
                        yield part
                except StreamError as error:
                    raise CorpusError(f"{document.name} cannot be read by {self._lm.spec}: {error}") from None
            elif self._lm.codebooks is not None:
                k = len(self._lm.codebooks.sizes)
                raise CorpusError(
                    f"{document.name} is text, and {self._lm.spec} reads frames of {k} codes: it has no tokenizer. Give it "
                    f"tokens:PATH, a .npy file of codes [frames, {k}]."
                )
            elif tokenizer is None:
                raise CorpusError(
                    f"{self._lm.spec} has no tokenizer (its vocabulary has {self._lm.vocab_size} entries; 256 would have meant "
                    "bytes), so text cannot be read with it. Give the model an attribute `tokenizer` with encode(text) -> "
                    "(ids, byte_ends), or use tokens:PATH with ids of your own."
                )
            elif document.text:
                self.content.update(document.text.encode(errors="surrogatepass"))
                ids, ends = (np.asarray(part, dtype=np.int64) for part in tokenizer.encode(document.text))
                if not begun and len(first := beginning(tokenizer, ids, rolling=self._rolling)):
                    yield Tokens(first, np.zeros(len(first), dtype=np.int64))
                begun = True
                yield Tokens(ids, np.diff(ends, prepend=0))


def beginning(tokenizer: Any, ids: np.ndarray, *, rolling: bool) -> np.ndarray:
    """The ids [n] to put before a text of these ids: the tokenizer's beginning-of-sequence token, if it has one.

    rolling  as lm-evaluation-harness 0.4.13 does in `loglikelihood_rolling`: the beginning-of-sequence token, or else the
             end-of-sequence token; then, unless the text begins with that token, the ids that the tokenizer adds by default
             (`prefix`), which are scored
    """
    bos, eos = (getattr(tokenizer, name, None) for name in ("bos", "eos"))
    first = eos if rolling and bos is None else bos
    if first is None:
        return np.empty(0, dtype=np.int64)
    own = getattr(tokenizer, "prefix", ()) if rolling and ids[0] != first else ()
    return np.array([first, *own], dtype=np.int64)
