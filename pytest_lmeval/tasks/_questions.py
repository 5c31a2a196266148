"""The kinds of questions: `Choices` are scored, the answer to `Generate` is generated, `Requests` are another harness'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeAlias

from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks._checks import as_int, check_text, is_number, texts


@dataclass(frozen=True)
class Choices:
    """A question with given answers: each is scored as a continuation of the prompt, all texts exactly as given.

    prompt         text before the answer; may be empty
    choices        at least one, each with the blank that divides it from the prompt. A single one is a cloze: would the model
                   say it?
    answer         index of the right choice, or indices if any of several is right
    group          what this question shares with others (a passage): their answers are not independent, and intervals are wider
    texts          one for each choice, which metrics of text compare in its place: the name that fills the gap of a sentence
    answer_prefix  see `Generate`
    question       id of the question to which this row and others are answers, each right or wrong; see the metric
                   "question_exact_match"
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | tuple[int, ...]
    group: str | None = None
    texts: tuple[str, ...] = ()
    answer_prefix: str = ""
    question: str | None = None

    def __post_init__(self) -> None:
        _check_texts(self)
        _check_group(self.group)
        _check_group(self.question, "question")
        for name in ("choices", "texts"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        several = isinstance(self.answer, tuple)
        object.__setattr__(self, "answer", tuple(map(as_int, self.answers)) if several else as_int(self.answer))
        if self.texts and len(self.texts) != len(self.choices):
            raise TaskError(f"{len(self.texts)} texts for {len(self.choices)} choices: there is one for each, or none.")
        if not self.choices or not all(self.choices):
            raise TaskError(f"choices {list(self.choices)!r}: a question has at least one, and each has text to be scored.")
        for answer in self.answers:
            if not is_number(answer, int) or not 0 <= answer < len(self.choices):
                raise TaskError(
                    f"the label is {answer!r}, and there are choices 0 to {len(self.choices) - 1} ({list(self.choices)!r}). "
                    + (
                        "A label is a number, and this is a text, as all values of a CSV file are: write int(...) around it."
                        if isinstance(answer, str)
                        else "A row without a label (hidden ones are often -1) cannot be scored: leave it out, or take another "
                        "split."
                    )
                )
        if not self.answers:
            raise TaskError(f"none of the choices {list(self.choices)!r} is right.")

    @property
    def answers(self) -> tuple[int, ...]:
        """Indices of the right choices."""
        return self.answer if isinstance(self.answer, tuple) else (self.answer,)

    @property
    def target(self) -> str:
        """The text after the prompt where this question is a few-shot example."""
        return self.choices[self.answers[0]]


@dataclass(frozen=True)
class Generate:
    """A question whose answer the model generates.

    prompt         text before the answer
    answers        right texts; () if there is nothing to compare with (see `Task.judge`)
    stop           texts that end the answer and are no part of it: the first in the text does. A special token is written as in
                   the vocabulary: "<|im_end|>"
    max_tokens     largest number of tokens of the answer
    temperature    0 takes the likeliest token; above 0 tokens are drawn, with a seed for each row
    group          see `Choices`
    answer_prefix  how the answer begins, such as "The answer is", which is given and no part of it: the beginning of the
                   assistant's turn in a chat; without turns it follows the prompt, after a blank if neither has one there
    top_k          draw from this many of the likeliest tokens; 0: from all
    top_p          then from the likeliest ones that together have this probability, in (0, 1]
    min_p          then from those at least this times as likely as the likeliest, in [0, 1)
    """

    prompt: str
    answers: tuple[str, ...]
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 256
    temperature: float = 0.0
    group: str | None = None
    answer_prefix: str = ""
    top_k: int = field(default=0, kw_only=True, repr=False)
    top_p: float = field(default=1.0, kw_only=True, repr=False)
    min_p: float = field(default=0.0, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        _check_texts(self)
        _check_group(self.group)
        for name in ("answers", "stop"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        if not all(self.stop):
            raise TaskError(f"stop {self.stop!r}: an empty text would end every answer before it began.")
        for name in ("max_tokens", "temperature"):
            object.__setattr__(self, name, as_int(getattr(self, name)))
        if not is_number(self.max_tokens, Integral) or self.max_tokens < 1:
            raise TaskError(f"max_tokens is {self.max_tokens!r}: an answer has a whole number of tokens, at least one.")
        if not is_number(self.temperature, Real) or not 0 <= self.temperature < math.inf:
            raise TaskError(f"temperature is {self.temperature!r}: it is a finite number, 0 or more.")
        object.__setattr__(self, "top_k", as_int(self.top_k))
        if not is_number(self.top_k, int) or self.top_k < 0:
            raise TaskError(f"top_k is {self.top_k!r}: it is a number of tokens, or 0 for all.")
        if not is_number(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise TaskError(f"top_p is {self.top_p!r}: it is a probability, above 0 and at most 1.")
        if not is_number(self.min_p, Real) or not 0 <= self.min_p < 1:
            raise TaskError(f"min_p is {self.min_p!r}: it is a fraction, 0 or more and below 1.")
        if self.drawn_from and not self.temperature:
            raise TaskError(f"{next(iter(self.drawn_from))} is given with temperature 0, where the likeliest token is taken.")

    @property
    def drawn_from(self) -> dict[str, float]:
        """What limits the tokens that are drawn, beside the temperature: those of top_k, top_p and min_p that do."""
        given = {"top_k": (self.top_k, 0), "top_p": (self.top_p, 1), "min_p": (self.min_p, 0)}
        return {name: value for name, (value, without) in given.items() if value != without}

    @property
    def target(self) -> str:
        """The text after the prompt where this question is a few-shot example."""
        return f" {self.answers[0]}" if self.answers else ""


@dataclass(frozen=True)
class Requests:
    """What another harness asks about one row: texts to be scored and answers to be generated, all exactly as given.

    scored     (context, continuation): the log-likelihood of the continuation after the context
    rolling    whole texts: their log-likelihood from the first token on, in windows where the model's context ends
    generated  prompts, each of which is answered
    target     the right answer, for the reader of the examples
    score      {"scored": [(nats, greedy)], "rolling": [nats], "generated": [text]} -> the numbers of the row by metric, which
               `Task.combine` combines over all rows; not all are floats
    group      see `Choices`
    """

    scored: tuple[tuple[str, str], ...]
    rolling: tuple[str, ...]
    generated: tuple[Generate, ...]
    target: str | None
    score: Callable[[dict[str, Sequence[Any]]], dict[str, Any]] = field(repr=False, compare=False)
    group: str | None = None

    @property
    def prompt(self) -> str:
        """The text before the first continuation or answer."""
        return next((text for text, _ in self.scored), next((one.prompt for one in self.generated), ""))


Question: TypeAlias = "Choices | Generate"
AnyQuestion: TypeAlias = "Choices | Generate | Requests"


def _check_texts(question: Choices | Generate) -> None:
    check_text("the prompt is a text, and this one", question.prompt)
    check_text("the answer_prefix is a text, and this one", question.answer_prefix)


def _check_group(group: Any, what: str = "group") -> None:
    if group is not None:
        check_text(f"the {what} is a text, or None, and this one", group)
