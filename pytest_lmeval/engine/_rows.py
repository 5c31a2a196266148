"""Score many short sequences in padded batches: no loss depends on padding or other rows (laws `causality` and `rows`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pytest_lmeval.engine._engine import Engine
from pytest_lmeval.engine._losses import check_finite
from pytest_lmeval.engine._policy import Policy
from pytest_lmeval.engine._tokens import check_vocabulary, naming
from pytest_lmeval.engine._tree import Request
from pytest_lmeval.errors import StreamError
from pytest_lmeval.models._model import Model


def score_rows(lm: Model, rows: Sequence[Any], *, batch_size: int = 32) -> list[np.ndarray]:
    """The losses of each row's tokens after its first, as if it were read alone: row i gives [t_i - 1] float64, nats.

    rows        sequences of ids [t], t >= 2, in any order
    batch_size  rows in a batch; 1 for a model that breaks the law `rows`

    Raises StreamError for a row without a target or with a token outside the vocabulary, NotFiniteError for a loss that is not
    finite; both name the row.
    """
    engine = Engine(lm, Policy(carry=False, batch_size=batch_size))
    engine.refuse_unreadable(())
    requests = []
    for number, row in enumerate(rows):
        with naming(f"row {number}"):
            requests.append(Request(row, 1))
            if not requests[-1].asked:
                raise StreamError("it has one token, and nothing before it to predict it from. Give it two at least.")
            check_vocabulary(requests[-1].ids, 0, lm)
    losses = [-scored.loglikelihood for scored in engine.score(requests)]
    for number, (nll, request) in enumerate(zip(losses, requests, strict=True)):
        with naming(f"row {number}"):
            check_finite(nll, request.ids, 1, lm)
    return losses
