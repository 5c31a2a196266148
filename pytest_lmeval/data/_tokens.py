"""Tokenize documents, with the number of bytes of each token: bits per byte counts those of the tokens that were scored."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from operator import attrgetter
from typing import Any

import numpy as np

from pytest_lmeval.data import corpus as named
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.data._joined import tokenized as joined
from pytest_lmeval.engine._tokens import Tokens, array_of, tokens_of
from pytest_lmeval.errors import CorpusError, SpecError, StreamError
from pytest_lmeval.models._model import Model, special_pattern, with_special_tokens
from pytest_lmeval.records._share import WHOLE, Share

LONGEST_SPECIAL = 100  # bytes of a special token that may be written across two parts of a text


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
    lm: Model,
    corpus: Corpus,
    *,
    by_document: bool,
    limit: int | None = None,
    tokens: int | None = None,
    rolling: bool = False,
    share: Share = WHOLE,
) -> Iterator[TokenReader]:
    """Yield a reader for each document of a corpus, or one for all documents as one stream.

    limit    most documents
    tokens   most tokens of each sequence
    rolling  begin texts as lm-evaluation-harness does (see `beginning`)
    share    of the documents, if they are read one by one
    """
    documents, lm = corpus.documents(), model_for(lm, corpus)
    if not by_document:
        yield TokenReader(lm, islice(documents, limit), limit=tokens, rolling=rolling)
        return
    for number, (name, parts) in enumerate(islice(groupby(documents, key=attrgetter("name")), limit)):
        if share.owns(name):
            yield TokenReader(lm, parts, number=number, limit=tokens, rolling=rolling)


class TokenReader:
    """Iterate over the tokens of consecutive documents as one stream, after the beginning-of-sequence token if there is one.
    Their texts are tokenized as one text (see `data._joined`).

    number   of the document, from 0
    limit    end before this token
    rolling  begin the text as lm-evaluation-harness does (see `beginning`)
    skip     begin with this token of the stream
    content  a hash of the text (or the ids) so far, including what was skipped
    special  special tokens that were written in the text so far, including what was skipped

    For a model with several codebooks, a token is a frame: ids are [n, k].
    """

    def __init__(
        self, lm: Model, documents: Iterable[Document], *, number: int = 0, limit: int | None = None, rolling: bool = False
    ) -> None:
        self.number = number
        self._lm, self._documents, self._limit, self._rolling = lm, documents, limit, rolling
        self.skip = self.special = 0
        self.content = hashlib.sha256()
        self._special, self._bytes, self._last = special_pattern(lm), 0, b""
        self._special_ends: deque[int] = deque()  # bytes of the text at which special tokens end, not yet counted
        self._begun: Iterator[Tokens] | None = None  # by `is_empty`

    @property
    def hexdigest(self) -> str:
        """The first digits of the hash of the content so far."""
        return self.content.hexdigest()[:16]

    @functools.cached_property
    def is_empty(self) -> bool:
        """Whether it has no target: fewer than two tokens, as far as the limit (or no frame). Reads no further than needed."""
        least, held, parts = 1 if self._lm.codebooks else 2, list[Tokens](), self._encoded()
        while (count := sum(map(len, held))) < least and (part := next(parts, None)) is not None:
            held.append(part)
        self._begun = chain(held, parts)
        return (count if self._limit is None else min(count, self._limit)) < least

    def __iter__(self) -> Iterator[Tokens]:
        at = text = 0
        parts, self._begun = self._begun or self._encoded(), None
        for part in parts:
            end = at + len(part) if self._limit is None else min(at + len(part), self._limit)
            text += int(part.widths[: end - at].sum())
            while self._special_ends and self._special_ends[0] <= text:
                self._special_ends.popleft()
                self.special += 1
            if (begin := max(at, self.skip)) < end:
                yield part[begin - at : end - at]
            at += len(part)
            if end == self._limit:
                return

    def _encoded(self) -> Iterator[Tokens]:
        begun = False
        for tokenized, documents in groupby(self._documents, key=lambda document: document.ids is not None):
            if tokenized:
                for document in documents:
                    yield from self._ids(document)
                continue
            for part in joined(self._lm.tokenizer, self._texts(documents)):
                if not begun and len(first := beginning(self._lm.tokenizer, part.ids, rolling=self._rolling)):
                    yield Tokens(first, np.zeros(len(first), dtype=np.int64))
                begun = True
                yield part

    def _ids(self, document: Document) -> Iterator[Tokens]:
        try:
            for part in tokens_of(iter([document.ids]), self._lm.codebooks):
                self.content.update(part.ids.tobytes())
                yield part
        except StreamError as error:
            raise CorpusError(f"{document.name} cannot be read by {self._lm.spec}: {error}") from None

    def _texts(self, documents: Iterable[Document]) -> Iterator[str]:
        for document in documents:
            if self._lm.codebooks is not None:
                k = len(self._lm.codebooks.sizes)
                raise CorpusError(
                    f"{document.name} is text, and {self._lm.spec} reads frames of {k} codes: it has no tokenizer. Give it "
                    f"tokens:PATH, a .npy file of codes [frames, {k}]."
                )
            if self._lm.tokenizer is None:
                raise CorpusError(
                    f"{self._lm.spec} has no tokenizer (its vocabulary has {self._lm.vocab_size} entries; 256 would have meant "
                    "bytes), so text cannot be read with it. Give the model an attribute `tokenizer` with encode(text) -> "
                    "(ids, byte_ends), or use tokens:PATH with ids of your own."
                )
            self._note(document.text.encode())
            yield document.text

    def _note(self, text: bytes) -> None:
        """Hash a part of the text, and find the special tokens that end in it."""
        self.content.update(text)
        if self._special is not None:
            text = self._last + text
            ends = (found.end() for found in self._special.finditer(text))
            self._special_ends.extend(self._bytes + end for end in ends if end > len(self._last))
            self._bytes += len(text)
            self._last = text[-LONGEST_SPECIAL:]
            self._bytes -= len(self._last)


def model_for(lm: Model, corpus: Corpus) -> Model:
    """The model with the tokenizer that reads the corpus as it says. Raises SpecError where it has none, or is a classifier."""
    if lm.classes:
        raise SpecError(
            f"{lm.spec} is a classifier, whose logits are over {list(lm.classes)!r}: it predicts no tokens of {corpus}. Ask it "
            "the task that it was fine-tuned for."
        )
    return with_special_tokens(lm) if corpus.special_tokens and not corpus.tokenized else lm


def notes_on(documents: int, skipped: int, special: int, *, read: bool) -> list[str]:
    """What to say about documents without a target, beside so many others, and about special tokens that are written in the
    text, and read as such or not."""
    notes = [f"{skipped:,} of {documents + skipped:,} documents skipped: nothing to score in them"] if skipped else []
    how = "control tokens" if read else "text"
    return [*notes, f"{special:,} special tokens are written in the text, read as {how}"] if special else notes


def nothing_to_score(corpus: Corpus, skipped: int) -> StreamError:
    """The error for a corpus of which no document has a target."""
    if not skipped:
        return StreamError(f"{corpus} holds no document, or no code that could be predicted: there is nothing to score.")
    return StreamError(
        f"{corpus} holds {skipped:,} document(s), and all are empty, or of one token, which has nothing before it to predict "
        "it from: there is nothing to score. Give it more text, more tokens of each document, or read it as_stream=True."
    )


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
