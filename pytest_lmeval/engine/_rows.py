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
from pytest_lmeval.engine._tokens import check_vocabulary
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
    engine.refuse_unreadable(())
    requests = []
    for number, row in enumerate(rows):
        with _of_row(number):
            requests.append(Request(row, 1))
            if not requests[-1].asked:
                raise StreamError("it has one token; the first token has nothing before it to be predicted from.")
            check_vocabulary(requests[-1].ids, 0, lm)
    losses = [-scored.loglikelihood for scored in engine.score(requests)]
    for number, (nll, request) in enumerate(zip(losses, requests, strict=True)):
        with _of_row(number):
            check_finite(nll, request.ids, 1, lm)
    return losses


@contextmanager
def _of_row(number: int) -> Iterator[None]:
    """Say which row an error is about."""
    try:
        yield
    except (StreamError, NotFiniteError) as error:
        raise type(error)(f"row {number}: {error}") from None
