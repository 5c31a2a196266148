"""From documents to token ids, remembering how many bytes of text each token stands for.

Bits per byte compares models of different vocabularies only if the bytes are those of the original text, and
only those of the tokens that were scored. So the width of every token is carried beside its id, until it is scored.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pytest_lmeval.data._corpus import Document
from pytest_lmeval.errors import CorpusError
from pytest_lmeval.models._model import Model


class TokenReader:
    """The ids of consecutive documents as one stream, and the widths of the tokens handed out so far.

    ids = TokenReader(lm, documents)       yields arrays of ids, the beginning-of-sequence token first if there is one
    ids.take_bytes(n)                      bytes of text [n] of the next n targets; zeros for a corpus of bare ids
    ids.content                            a hash of the text (or the ids) so far, also of what was skipped

    A model of several codebooks is given frames [n, k]; such a frame is one token here.

    skip     begin with this token of the stream
    scored   targets whose bytes were taken before (token 0 is no target: its bytes are never counted; the first frame is one)
    limit    end before this token
    rolling  put before the text what lm-evaluation-harness does (see `beginning`)
    """

    def __init__(
        self,
        lm: Model,
        documents: Iterable[Document],
        *,
        skip: int = 0,
        scored: int = 0,
        limit: int | None = None,
        rolling: bool = False,
    ) -> None:
        self._lm, self._documents, self._rolling = lm, documents, rolling
        self._skip, self._scored, self._limit = skip, scored, limit
        self._widths: deque[np.ndarray] = deque()
        self.content = hashlib.sha256()

    def __iter__(self) -> Iterator[np.ndarray]:
        at, first = 0, self._scored + (self._lm.codebooks is None)
        for ids, widths in self._encoded():
            end = at + len(ids) if self._limit is None else min(at + len(ids), self._limit)
            if (begin := max(at, self._skip)) < end:
                self._widths.append(widths[max(at, first) - at : end - at])
                yield ids[begin - at : end - at]
            at += len(ids)
            if end == self._limit:
                return

    def take_bytes(self, count: int) -> np.ndarray:
        parts = []
        while count:
            widths = self._widths.popleft()
            if len(widths) > count:
                self._widths.appendleft(widths[count:])
                widths = widths[:count]
            parts.append(widths)
            count -= len(widths)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _encoded(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        tokenizer, begun = self._lm.tokenizer, False
        for document in self._documents:
            if document.ids is not None:
                _check_kind(document.ids, self._lm, document.name)
                for begin in range(0, len(document.ids), 1 << 16):
                    ids = np.asarray(document.ids[begin : begin + (1 << 16)], dtype=np.int64)
                    self.content.update(ids.tobytes())
                    yield ids, np.broadcast_to(np.int64(0), len(ids))
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
                    yield first, np.zeros(len(first), dtype=np.int64)
                begun = True
                yield ids, np.diff(ends, prepend=0)


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


def _check_kind(ids: np.ndarray, lm: Model, name: str) -> None:
    """Raise CorpusError unless these are integers of the shape that the model reads: [n], or [n, k] for k codebooks."""
    if not np.issubdtype(ids.dtype, np.integer) and len(ids):
        raise CorpusError(f"{name}: token ids are integers; these are {ids.dtype}.")
    codes = None if lm.codebooks is None else len(lm.codebooks.sizes)
    if ids.shape[1:] != (() if codes is None else (codes,)):
        has = "one id after the other" if ids.ndim == 1 else f"frames of {ids.shape[-1]} codes"
        reads = "one token after the other" if codes is None else f"frames of {codes} codes"
        raise CorpusError(f"{name} has {has}, shape {list(ids.shape)}; {lm.spec} reads {reads}.")
