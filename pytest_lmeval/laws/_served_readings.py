"""Compare two readings of one sequence by a served model: log-probabilities, or answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from pytest_lmeval.errors import ModelError
from pytest_lmeval.models._served import ServedAnswer

Reading: TypeAlias = "np.ndarray | ServedAnswer"
"""Log-probabilities of a sequence's tokens but the first; of a server that gives none, an answer to it."""


def beginning_of(found: Reading, count: int) -> np.ndarray:
    assert isinstance(found, np.ndarray)
    return found[:count]


def comparable(one: Reading, other: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Two readings as numbers to compare: log-probabilities; of answers those up to the first token that differs, where a tie
    may have fallen otherwise. Without log-probabilities: 0, and nan where the texts differ."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.shape != other.shape:
            raise ModelError(f"two readings of one sequence have {len(one)} and {len(other)} log-probabilities")
        return one, other
    assert isinstance(one, ServedAnswer)
    assert isinstance(other, ServedAnswer)
    if one.ids is None or other.ids is None or one.logprobs is None or other.logprobs is None:
        same = one.text == other.text if one.ids is None or other.ids is None else list(one.ids) == list(other.ids)
        return np.zeros(1), np.array([0.0 if same else math.nan])
    until = next(_differ(one.ids, other.ids), min(len(one.ids), len(other.ids)) - 1) + 1
    return np.array(one.logprobs[:until]), np.array(other.logprobs[:until])


def _differ(one: Sequence[int], other: Sequence[int]) -> Iterator[int]:
    return (at for at, (ours, theirs) in enumerate(zip(one, other, strict=False)) if ours != theirs)


def relative_difference(one: Reading, other: Reading) -> float:
    """The largest difference of two readings over 1 + |log-probability|, as far as it is finite."""
    ours, theirs = comparable(one, other)
    found = np.abs(ours - theirs) / (1 + np.abs(ours))
    return float(np.max(found[np.isfinite(found)], initial=0.0))
