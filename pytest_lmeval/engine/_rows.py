"""Many short sequences, scored side by side: what each costs does not depend on who stands beside it.

Rows of like length share a batch, the shorter ones padded on the right. What comes after a row's last token changes nothing
before it, and a row does not see its neighbours: both are laws that the model is probed for (`causality`, `rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pytest_lmeval.engine._engine import Engine
from pytest_lmeval.engine._losses import check_finite
from pytest_lmeval.engine._policy import Policy
from pytest_lmeval.engine._tokens import array_of, check_vocabulary
from pytest_lmeval.engine._tree import Request
from pytest_lmeval.errors import NotFiniteError, StreamError
from pytest_lmeval.models._model import Model


def score_rows(lm: Model, rows: Sequence[Any], *, batch_size: int = 32) -> list[np.ndarray]:
    """The losses of each row's tokens after its first, as if it were read alone: row i gives [t_i - 1] float64, nats.

    rows        sequences of ids [t], t >= 2, in any order
    batch_size  rows side by side; 1 for a model that breaks the law `rows`

    Raises StreamError for a row that has nothing to score or a token outside the vocabulary, NotFiniteError for a loss that
    is not finite; both name the row.
    """
    engine = Engine(lm, Policy(carry=False, batch_size=batch_size))
    tokens = [_ids(row, place, lm) for place, row in enumerate(rows)]
    losses = [-scored.loglikelihood for scored in engine.score([Request(ids, 1) for ids in tokens])]
    for place, (nll, ids) in enumerate(zip(losses, tokens, strict=True)):
        with _of_row(place):
            check_finite(nll, ids, 1, lm)
    return losses


def _ids(row: Any, place: int, lm: Model) -> np.ndarray:
    held = array_of(row)
    ids = np.asarray(row) if held is None else held
    if ids.ndim != 1 or len(ids) < 2 or not np.issubdtype(ids.dtype, np.integer):
        raise StreamError(
            f"row {place} is {list(ids.shape)} of {ids.dtype}; a row is at least two integer ids: the first token has nothing "
            "before it to be predicted from."
        )
    ids = ids.astype(np.int64)
    with _of_row(place):
        check_vocabulary(ids, 0, lm)
    return ids


@contextmanager
def _of_row(place: int) -> Iterator[None]:
    """Say which row an error is about."""
    try:
        yield
    except (StreamError, NotFiniteError) as error:
        raise type(error)(f"row {place}: {error}") from None
