"""A question as token ids, as the engine reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pytest_lmeval.engine._tree import Request
from pytest_lmeval.tasks._questions import AnyQuestion


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as the model reads it.

    prompt         the whole text before the answer, without what did not fit
    key            hash of everything that decides the answer
    requests       one for each choice; the prompt alone if the answer is generated; of `Requests` those of its scored texts, of
                   its rolling ones, and of its prompts
    sizes          of `Requests`: how many requests each scored and each rolling text has
    answers        how many of the requests, the last ones, are prompts to be answered
    truncated      tokens of the question that did not fit
    shots_dropped  few-shot examples that did not fit
    special        a special token is written in its texts; those of a chat template do not count
    row            that it was made of, as `ask` was given it
    thinking       texts between which the model thinks; None: it does not
    repeat         which of several answers to the question this asks for
    """

    id: str
    number: int
    question: AnyQuestion
    prompt: str
    key: str
    requests: list[Request]
    truncated: int = 0
    shots_dropped: int = 0
    retokenized: bool = False
    special: bool = False
    sizes: tuple[int, ...] = ()
    answers: int = 0
    row: Any = field(default=None, repr=False, compare=False)
    thinking: tuple[str, str] | None = None
    repeat: int = 0

    @property
    def scored(self) -> list[Request]:
        """The requests whose log-likelihood is wanted."""
        return self.requests[: len(self.requests) - self.answers]

    @property
    def place(self) -> tuple[int, int]:
        """What no other question of the task has: the index of the row, and which answer to it."""
        return self.number, self.repeat

    def repeated(self, times: int) -> Iterator[EncodedQuestion]:
        """The question as often as it is to be answered, each time with a key of its own."""
        yield self
        for repeat in range(1, times):
            key = hashlib.sha256(f"{self.key}/{repeat}".encode()).hexdigest()[:16]
            yield replace(self, key=key, repeat=repeat)
