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

from pytest_lmeval.errors import NotFiniteError, TaskError
from pytest_lmeval.models._model import Model

Listener: TypeAlias = "Callable[[int, str], bool | None]"
"""(number of the prompt, text so far) -> None to go on, or what was heard, which ends the answer."""


@dataclass(frozen=True)
class Prompt:
    """What is to be continued, and how.

    ids          [n] at least one
    name         of its row: what draws depend on, beside the seed, and what an error names
    max_tokens   of the answer
    stop         texts that end it, and are no part of it
    temperature  0 takes the likeliest token; else what log-probabilities are divided by before one is drawn
    """

    ids: np.ndarray
    name: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0


@dataclass(eq=False)
class Answer:
    """The answer to one prompt, in the making.

    ids    generated so far
    text   of these, cut before the stop that ended it
    heard  what the listener said, as soon as it said something
    read   tokens that were read for it
    why    it ended: stop, end (the model's own), heard, or length; empty while it goes on
    given  the ids that are to be read next
    """

    prompt: Prompt
    draws: np.random.Generator
    ids: list[int] = field(default_factory=list)
    text: str = ""
    heard: bool | None = None
    read: int = 0
    why: str = ""
    given: list[int] = field(default_factory=list)


def begin_answers(
    lm: Model, prompts: Sequence[Prompt], listen: Listener | None
) -> tuple[list[Answer], Callable[[Tensor, list[Answer]], None]]:
    """An answer to each prompt, and what takes the logits [b, v] of b answers: it chooses a token for each.

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
    answers = [Answer(prompt, _draws(prompt)) for prompt in prompts]
    numbers = {id(answer): number for number, answer in enumerate(answers)}

    def hear(logits: Tensor, rows: list[Answer]) -> None:
        _check_finite(logits, rows, lm)
        for token, row in zip(_chosen(logits, rows), rows, strict=True):
            if token in ends:
                row.why = "end"
            else:
                _take(row, token, tokenizer)
            if listen is not None and (heard := listen(numbers[id(row)], row.text)) is not None:
                row.heard, row.why = heard, row.why or "heard"

    return answers, hear


def _take(row: Answer, token: int, tokenizer: Any) -> None:
    """One more token for a row, and whether that ends it."""
    row.ids.append(token)
    row.text = tokenizer.decode(row.ids)
    stops = [place for stop in row.prompt.stop if (place := row.text.find(stop)) >= 0]
    if stops:
        row.text, row.why = row.text[: min(stops)], "stop"
    elif len(row.ids) >= row.prompt.max_tokens:
        row.why = "length"


def _check_finite(logits: Tensor, rows: list[Answer], lm: Model) -> None:
    """Masked-out logits may be minus infinity; all of them, or any other that is not finite, leave nothing to choose from."""
    wrong = (torch.isnan(logits) | (logits == torch.inf)).any(1) | torch.isneginf(logits).all(1)
    for place in wrong.nonzero().flatten().tolist():
        raise NotFiniteError(
            f"{lm.spec} gave logits that are not finite after {len(rows[place].ids)} generated token(s) of row "
            f"{rows[place].prompt.name}, in {lm.dtype} on {lm.device}. Nothing can be chosen from them; what was finished "
            "before is kept."
        )


def _chosen(logits: Tensor, rows: list[Answer]) -> list[int]:
    """A token for each row [b]: the likeliest, or one that is drawn by the row's own random numbers."""
    likeliest: list[int] = logits.argmax(1).tolist()
    return [
        _drawn(said, row) if row.prompt.temperature else best for said, row, best in zip(logits, rows, likeliest, strict=True)
    ]


def _drawn(logits: Tensor, row: Answer) -> int:
    chances = torch.softmax(logits.double().cpu() / row.prompt.temperature, 0).cumsum(0).numpy()
    return int(np.searchsorted(chances, row.draws.random() * chances[-1], side="right").clip(max=len(chances) - 1))


def _draws(prompt: Prompt) -> np.random.Generator:
    """The random numbers of one row."""
    digest = hashlib.sha256(f"{prompt.seed}/{prompt.name}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))
