"""The token ids of texts and prompts, with what a tokenizer puts before them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._chat import Rendered, encode
from pytest_lmeval.models._model import Model


def prefix_of(lm: Model, ids: np.ndarray, rendered: Rendered | None = None) -> np.ndarray:
    """The ids [p] that the tokenizer puts before a prompt of these ids, unless it begins with them; none before turns,
    whose template writes its own."""
    tokenizer: Any = lm.tokenizer
    bos, eos = getattr(tokenizer, "bos", None), getattr(tokenizer, "eos", None)
    prefix = tuple(getattr(tokenizer, "prefix", () if bos is None else (bos,)))
    first = bos if bos is not None else eos
    if not len(ids) and first is not None:
        prefix = prefix or (first,)
    there = rendered is not None or (prefix and tuple(ids[: len(prefix)]) == prefix)
    return np.array(() if there else prefix, dtype=np.int64)


def encoded(lm: Model, text: str, rendered: Rendered | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text [n], and the byte where each ends [n], which is not known of a rendered conversation."""
    assert lm.tokenizer is not None
    if rendered is not None:
        return encode(lm, rendered, text), np.empty(0, dtype=np.int64)
    ids, ends = lm.tokenizer.encode(text)
    return np.asarray(ids, dtype=np.int64), np.asarray(ends, dtype=np.int64)


def begun(lm: Model, prompt: str, where: str, rendered: Rendered | None = None) -> tuple[np.ndarray, int, np.ndarray]:
    """The ids of a prompt [p + n] after those that the tokenizer puts before it, how many these are, and the byte where each of
    the others ends [n]. Raises TaskError if there are none."""
    alone, ends = encoded(lm, prompt, rendered)
    prefix = prefix_of(lm, alone, rendered)
    if not len(prefix) + len(alone):
        raise TaskError(f"{where}: the prompt is empty, and the tokenizer has no beginning-of-sequence token.")
    return np.concatenate([prefix, alone]), len(prefix), ends
