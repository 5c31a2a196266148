"""Answers in the model's own words: each token chosen, the text so far looked at, until something ends it.

The choice of a token is the likeliest one, or drawn by the row's own random numbers: what a row says depends on no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.engine._tokens import ids_of
from pytest_lmeval.errors import NotFiniteError, StreamError, TaskError
from pytest_lmeval.models._model import Model

OnText: TypeAlias = "Callable[[int, str], bool | None]"
"""(number of the prompt, text so far) -> None to go on, or a truth value that ends the answer."""


@dataclass(frozen=True)
class Prompt:
    """What is to be continued, and how. Raises StreamError for what cannot be.

    ids          [n] at least one
    name         of its row: what draws depend on, beside the seed, and what an error names
    max_tokens   of the answer, at least one
    stop         texts that end it, and are no part of it
    temperature  0 takes the likeliest token; else what log-probabilities are divided by before one is drawn
    """

    ids: np.ndarray
    name: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", ids_of(self.ids, f"the prompt of {self.name}"))
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise StreamError(f"the prompt of {self.name} has stop={self.stop!r}: it is a tuple of texts that are not empty.")
        if self.max_tokens < 1 or not 0 <= self.temperature < np.inf:
            raise StreamError(
                f"the prompt of {self.name} has max_tokens={self.max_tokens} and temperature={self.temperature}: an answer has "
                "at least one token, and a temperature is a number from 0 up."
            )


@dataclass(eq=False)
class Answer:
    """The answer to one prompt, in the making.

    ids     generated so far
    text    of these, cut before the stop that ended it
    judged  the truth value that `on_text` returned, as soon as it did
    read    tokens that were read for it
    why     it ended: stop, end (the model's own), judged, or length; empty while it goes on
    """

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    text: str = ""
    judged: bool | None = None
    read: int = 0
    why: str = ""


def begin_answers(
    lm: Model, prompts: Sequence[Prompt], on_text: OnText | None
) -> tuple[list[Answer], Callable[[Tensor, list[Answer]], None]]:
    """An answer to each prompt, and what chooses a token for each of b answers from the logits [b, v] after it.

    Raises TaskError for a tokenizer that cannot turn ids into text; what it returns raises NotFiniteError for logits from which
    nothing can be chosen.
    """
    tokenizer: Any = lm.tokenizer
    if not hasattr(tokenizer, "decode"):
        raise TaskError(
            f"the tokenizer of {lm.spec} has no decode(ids) -> text, so what the model says cannot be read. Give it that "
            "method."
        )
    ends = getattr(tokenizer, "ends", (getattr(tokenizer, "eos", None),))
    answers = [Answer(prompt) for prompt in prompts]
    numbers = {id(answer): number for number, answer in enumerate(answers)}
    draws = [_draws(prompt) for prompt in prompts]

    def choose(logits: Tensor, rows: list[Answer]) -> None:
        _check_finite(logits, rows, lm)
        for row, said, likeliest in zip(rows, logits, logits.argmax(1).tolist(), strict=True):
            number, temperature = numbers[id(row)], row.prompt.temperature
            token = _drawn(said, temperature, draws[number]) if temperature else likeliest
            if token in ends:
                row.why = "end"
            else:
                _take(row, token, tokenizer)
            if on_text is not None and (judged := on_text(number, row.text)) is not None:
                row.judged, row.why = judged, row.why or "judged"

    return answers, choose


def _take(row: Answer, token: int, tokenizer: Any) -> None:
    """One more token for a row, and whether that ends it."""
    row.ids.append(token)
    row.text = tokenizer.decode(row.ids)
    stops = [index for stop in row.prompt.stop if (index := row.text.find(stop)) >= 0]
    if stops:
        row.text, row.why = row.text[: min(stops)], "stop"
    elif len(row.ids) >= row.prompt.max_tokens:
        row.why = "length"


def _check_finite(logits: Tensor, rows: list[Answer], lm: Model) -> None:
    """Masked-out logits may be minus infinity; all of them, or any other that is not finite, leave nothing to choose from."""
    wrong = (torch.isnan(logits) | (logits == torch.inf)).any(1) | torch.isneginf(logits).all(1)
    for row in wrong.nonzero().flatten().tolist():
        raise NotFiniteError(
            f"{lm.spec} gave logits that are not finite after {len(rows[row].ids)} generated token(s) of row "
            f"{rows[row].prompt.name}, in {lm.dtype} on {lm.device}. Nothing can be chosen from them; what was finished "
            "before is kept."
        )


def _drawn(logits: Tensor, temperature: float, draws: np.random.Generator) -> int:
    """A token that is drawn from logits [v]."""
    chances = torch.softmax(logits.double().cpu() / temperature, 0).cumsum(0).numpy()
    return int(np.searchsorted(chances, draws.random() * chances[-1], side="right").clip(max=len(chances) - 1))


def _draws(prompt: Prompt) -> np.random.Generator:
    """The random numbers of one row."""
    digest = hashlib.sha256(f"{prompt.seed}/{prompt.name}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))
