"""From documents to token ids, and the bytes of text that each token stands for.

Bits per byte compares models of different vocabularies only if the bytes are those of the original text, and only those of the
tokens that were scored. So the width of every token stands beside its id until it is scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

import numpy as np

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.engine._tokens import Tokens, tokens_of
from pytest_lmeval.errors import CorpusError, StreamError
from pytest_lmeval.models._model import Model


def sequences(
    lm: Model, corpus: Corpus, *, by_document: bool, limit: int | None = None, tokens: int | None = None, rolling: bool = False
) -> Iterator[TokenReader]:
    """What is read from an empty state each: the documents of a corpus, or all of them as one stream.

    limit    so many documents
    tokens   so many tokens of each sequence
    rolling  put before a text what lm-evaluation-harness does (see `beginning`), and tokenize a document whole, as it does
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
    """The tokens of consecutive documents as one stream, the beginning-of-sequence token first if there is one.

    ids = TokenReader(lm, documents)       an iterator of `Tokens`
    ids.skip = 1000                        begin with this token of the stream
    ids.content                            a hash of the text (or the ids) so far, also of what was skipped

    A model of several codebooks is given frames [n, k]; such a frame is one token here.

    limit    end before this token
    rolling  put before the text what lm-evaluation-harness does (see `beginning`)
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
                    f"{self._lm.spec} has no tokenizer, so text cannot be read with it (its vocabulary has "
                    f"{self._lm.vocab_size} entries; 256 would have meant bytes). Give the model an attribute `tokenizer` "
                    "with encode(text) -> (ids, byte_ends), or use tokens:PATH with ids of your own."
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

    rolling  what lm-evaluation-harness 0.4.13 puts there (`loglikelihood_rolling`): without a beginning-of-sequence token the
             end-of-sequence token; after it the ids that the tokenizer adds of its own accord (`prefix`), which are scored, so
             that a tokenizer that adds its beginning-of-sequence token has it there twice. It adds none to a text that begins
             with that token itself.
    """
    bos, eos = (getattr(tokenizer, name, None) for name in ("bos", "eos"))
    first = eos if rolling and bos is None else bos
    if first is None:
        return np.empty(0, dtype=np.int64)
    own = getattr(tokenizer, "prefix", ()) if rolling and ids[0] != first else ()
    return np.array([first, *own], dtype=np.int64)
