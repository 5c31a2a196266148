"""Many short sequences, scored side by side: what each costs does not depend on who stands beside it.

Rows of like length share a batch, the shorter ones filled up on the right. What comes after a row's last token changes
nothing before it, and a row does not see its neighbours: both are laws that the model is probed for (`causality`, `rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pytest_lmeval._stream import check_finite, check_vocabulary, score
from pytest_lmeval.errors import NotFiniteError, StreamError
from pytest_lmeval.models._model import Model

FILLER = 0


def score_rows(lm: Model, rows: Sequence[Any], *, batch_size: int = 32) -> list[np.ndarray]:
    """The losses of each row's tokens after its first, as if it were read alone: row i gives [t_i - 1] float64, nats.

    rows        sequences of ids [t], t >= 2, in any order
    batch_size  rows side by side; 1 for a model that breaks the law `rows`

    Raises StreamError for a row that has nothing to score or a token outside the vocabulary, NotFiniteError for a loss that
    is not finite; both name the row.
    """
    if batch_size < 1:
        raise StreamError(f"batch_size is {batch_size}; a batch has at least one row.")
    tokens = [_ids(row, place, lm) for place, row in enumerate(rows)]
    longest_first = sorted(range(len(tokens)), key=lambda place: -len(tokens[place]))  # what does not fit, fails at once
    losses: list[np.ndarray] = [np.empty(0)] * len(tokens)
    for begin in range(0, len(tokens), batch_size):
        places = longest_first[begin : begin + batch_size]
        width = len(tokens[places[0]]) - 1
        batch = torch.full((len(places), width), FILLER)
        for number, place in enumerate(places):
            batch[number, : len(tokens[place]) - 1] = torch.from_numpy(tokens[place][:-1])
        with torch.no_grad():
            logits, _ = lm.step(batch.to(lm.device))
        for number, place in enumerate(places):
            targets = torch.from_numpy(tokens[place][1:]).to(lm.device)
            nll, _ = score(logits[number, : len(targets)], targets)
            with _of_row(place):
                check_finite(nll, tokens[place], 1, lm)
            losses[place] = nll
    return losses


def _ids(row: Any, place: int, lm: Model) -> np.ndarray:
    ids: np.ndarray = np.asarray(row.cpu() if isinstance(row, torch.Tensor) else row)
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
