"""What a task is: rows, how a row reads, which answer is right, and what is told of the answers.

    def ask(row):
        return Choices(f"Is {row['n']} even?\\nAnswer:", (" no", " yes"), answer=1 - row["n"] % 2)

    PARITY = Task("parity", [{"n": n} for n in range(100)], ask)

The text of a prompt and of a choice is exactly what the model reads: blanks between them stand where the task put them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pytest_lmeval.data.rows import Row, Rows


class TaskError(ValueError):
    """A task that cannot be asked: a row without a field, a label outside the choices, an unknown name."""


@dataclass(frozen=True)
class Choices:
    """A question whose answers are given: each is scored as what follows the prompt.

    prompt   what the model reads first; may be empty
    choices  at least one; with the blank that divides it from the prompt. One alone is a cloze: is it what the model would say?
    answer   which of them is right; several where any of them is
    group    what this question shares with others (a passage): their answers depend on one another, and so does the interval
    texts    what metrics of text compare in place of the choices, one for each: the name that a sentence was filled in with
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | tuple[int, ...]
    group: str | None = None
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("choices", "texts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.texts and len(self.texts) != len(self.choices):
            raise TaskError(f"{len(self.texts)} texts for {len(self.choices)} choices: there is one for each, or none.")
        if not self.choices or not all(isinstance(choice, str) and choice for choice in self.choices):
            raise TaskError(f"choices {list(self.choices)!r}: a question has at least one, and each has text to be scored.")
        for answer in self.answers:
            if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(self.choices):
                raise TaskError(
                    f"the label is {answer!r}, and there are choices 0 to {len(self.choices) - 1} ({list(self.choices)!r}). A "
                    "row without a label (hidden ones are often -1) cannot be judged: leave it out, or take another split."
                )
        if not self.answers:
            raise TaskError(f"none of the choices {list(self.choices)!r} is right.")

    @property
    def answers(self) -> tuple[int, ...]:
        """The right choices."""
        return self.answer if isinstance(self.answer, tuple) else (self.answer,)

    @property
    def solution(self) -> str:
        """What follows the prompt where this question is an example that is shown."""
        return self.choices[self.answers[0]]


@dataclass(frozen=True)
class Generate:
    """A question that the model answers in its own words.

    prompt       what the model reads first
    answers      texts that are right; () where there is nothing to compare with (see `Task.judge`)
    stop         texts that end the answer and are no part of it
    max_tokens   that are generated at most
    temperature  0 takes the likeliest token; above, tokens are drawn, by a seed of the row's own
    group        see `Choices`
    """

    prompt: str
    answers: tuple[str, ...]
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 256
    temperature: float = 0.0
    group: str | None = None

    def __post_init__(self) -> None:
        for name in ("answers", "stop"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(isinstance(text, str) for text in self.answers):
            raise TaskError(f"answers {self.answers!r}: each is a text.")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise TaskError(f"stop {self.stop!r}: an empty text would end every answer before it began.")
        if self.max_tokens < 1 or self.temperature < 0:
            raise TaskError(
                f"max_tokens is {self.max_tokens} and temperature {self.temperature}: an answer has at least one token, and a "
                "temperature is 0 or more."
            )

    @property
    def solution(self) -> str:
        """What follows the prompt where this question is an example that is shown."""
        return f" {self.answers[0]}" if self.answers else ""


Question: TypeAlias = "Choices | Generate"
Ask: TypeAlias = "Callable[[Row], Question | None]"
Judge: TypeAlias = "Callable[[str], bool | None]"


@dataclass(frozen=True)
class Task:
    """`rows` and `shots` may be a dataset of the hub or a file (`Rows`), a list, or a function that returns an iterator.

    name         by which it is asked for and reported
    rows         where the questions lie
    ask          how a row reads; None for a row that is no question (it is counted)
    metrics      see `scoring.metrics.METRICS`; the first is the one that suites average
    shots        where examples to show are taken from; () for none
    take         "draw": each question draws its own, by its own hash; "first": all are shown the first ones
    description  what stands before everything, once
    between      what stands between an example and what follows it
    judge        of an answer in the making: True or False as soon as it is certain, else None; see `metrics` "rate"
    threshold    of the rate of answers that were judged True: is it above or below? Asked no longer than until that is certain
    style        whose prompts these are; part of the record
    version      raised when the prompts or the rules change
    """

    name: str
    rows: Rows | Sequence[Row] | Callable[[], Iterable[Row]]
    ask: Ask
    metrics: tuple[str, ...] = ("accuracy",)
    shots: Rows | Sequence[Row] | Callable[[], Iterable[Row]] = ()
    take: str = "draw"
    description: str = ""
    between: str = "\n\n"
    judge: Judge | None = None
    threshold: float | None = None
    style: str = "own"
    version: int = 1

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Suite:
    """Tasks whose first metrics are averaged: each counts the same, or by its number of questions if `weighted`."""

    name: str
    tasks: tuple[Task, ...]
    weighted: bool = False


def id_of(row: Row) -> str:
    """Sixteen hex digits of a row's content: what it is called in files, and what its draws depend on."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()[:16]
