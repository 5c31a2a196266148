"""Token ids that stand in no file, as a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from pytest_lmeval.data._corpus import Corpus, Document


def as_corpus(source: Corpus | Iterable[Any]) -> Corpus:
    """A corpus as it is; token ids (tensor, array, list, range, iterator of arrays) as a corpus of one document. An iterator
    can be read once, and is never held."""
    if isinstance(source, Corpus):
        return source
    ids: Any = source.detach().cpu().numpy() if hasattr(source, "detach") else source
    if isinstance(ids, list | tuple | range | np.ndarray):
        held = np.asarray(ids)
        digest = hashlib.sha256(np.ascontiguousarray(held).tobytes()).hexdigest()
        return Corpus("ids", "test", lambda: iter([Document("ids", ids=held)]), digest, tokenized=True, size=len(held))
    parts = (Document("ids", ids=np.atleast_1d(np.asarray(part))) for part in ids)
    return Corpus("ids", "test", lambda: parts, "", tokenized=True)
