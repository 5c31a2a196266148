"""Token ids that stand in no file, as a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.engine._tokens import array_of


def as_corpus(source: Corpus | Iterable[Any]) -> Corpus:
    """A corpus as it is; token ids (tensor, array, list, range, iterator of arrays) as a corpus of one document. An iterator
    can be read once, and is never held."""
    if isinstance(source, Corpus):
        return source
    if (held := array_of(source)) is not None:
        digest = hashlib.sha256(np.ascontiguousarray(held).tobytes()).hexdigest()
        return Corpus("ids", "test", lambda: iter([Document("ids", ids=held)]), digest, tokenized=True, size=len(held))
    parts = (Document("ids", ids=part) for part in source)
    return Corpus("ids", "test", lambda: parts, "", tokenized=True)
