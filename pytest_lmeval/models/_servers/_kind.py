"""Define the protocol of one kind of server: what is sent to it, and how its answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from pytest_lmeval.models._served import Asking, Scoring, ServedAnswer, ServerFacts, TokenScores

Job: TypeAlias = "tuple[str, dict[str, Any]]"
"""A path, and what is posted to it."""

GIVEN_UP = ("abort", "error", "content_filter")  # finish reasons of answers that are not whole


class Kind(Protocol):
    """One kind of server.

    `scores` and `answered` raise LookupError, TypeError or ValueError for an answer that is not of this kind.
    """

    @property
    def facts(self) -> ServerFacts: ...

    def scoring(self, asked: Scoring) -> Job:
        """What asks for the log-probabilities of a sequence."""

    def scores(self, asked: Scoring, answer: Any) -> TokenScores:
        """These log-probabilities."""

    def asking(self, asked: Asking) -> Job:
        """What asks for an answer to a prompt."""

    def answered(self, asked: Asking, answer: Any) -> ServedAnswer:
        """This answer."""

    def tokenizing(self, text: str) -> Job | None:
        """What asks for the token ids of a text; None: the server cannot be asked."""

    def templating(self, messages: Sequence[dict[str, str]]) -> Job | None:
        """What asks for the prompt that its chat template makes of messages; None: the server cannot be asked."""


def same_ids(found: Sequence[Any], asked: Sequence[int], what: str) -> None:
    """Raise ValueError where the ids of an answer are others than those asked for."""
    if len(found) != len(asked):
        raise ValueError(f"{len(found)} {what} for {len(asked)} tokens")
    if (at := next((at for at, (one, own) in enumerate(zip(found, asked, strict=True)) if int(one) != own), None)) is not None:
        raise ValueError(f"id {found[at]} in place of {asked[at]} at token {at}")


def first_is_none(entries: Sequence[Any]) -> None:
    """Raise ValueError unless the first entry is None: nothing stands before the first token to predict it from."""
    if not entries or entries[0] is not None:
        raise ValueError(f"its first entry is {entries[0]!r}, not null" if entries else "it has no entries")


def ranks_of(logprobs: np.ndarray, ids: Sequence[int], top: Sequence[dict[int, float]]) -> np.ndarray:
    """[n] The number of more likely tokens among the most likely ones that the server gave of each position."""
    return np.array(
        [
            sum(value > own or (value == own and other < token) for other, value in most.items() if other != token)
            for own, token, most in zip(logprobs.tolist(), ids, top, strict=True)
        ],
        dtype=np.int64,
    )


def numbers(values: Sequence[Any]) -> np.ndarray:
    """[n] float64; null becomes nan."""
    return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)


def count(value: Any) -> int | None:
    """A number of tokens above 0; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def was_cut(reason: Any, ended: Sequence[str] = ("stop",), length: str = "length") -> bool:
    """Whether an answer ended because it was as long as asked for. Raises ValueError for one that did not end."""
    if reason not in (*ended, length):
        raise ValueError(f"the answer was not finished, but given up: its finish reason is {reason!r}")
    return bool(reason == length)


def refuse_unfinished(reason: Any) -> None:
    """Raise ValueError for an answer that the server gave up; other servers have their own words for how an answer ended."""
    if reason in GIVEN_UP:
        was_cut(reason)
