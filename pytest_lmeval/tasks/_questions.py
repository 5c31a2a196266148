"""What a task is: rows, how a row reads, which answer is right, and what is told of the answers.

    def ask(row):
        return Choices(f"Is {row['n']} even?\\nAnswer:", (" no", " yes"), answer=1 - row["n"] % 2)

    PARITY = Task("parity", [{"n": n} for n in range(100)], ask)

The text of a prompt and of a choice is exactly what the model reads: blanks between them stand where the task put them.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

from pytest_lmeval.data._rows import Row, Rows
from pytest_lmeval.errors import TaskError


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
        _refuse_prompt(self.prompt)
        for name in ("choices", "texts"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        several = isinstance(self.answer, tuple)
        object.__setattr__(self, "answer", tuple(map(_whole, self.answers)) if several else _whole(self.answer))
        if self.texts and len(self.texts) != len(self.choices):
            raise TaskError(f"{len(self.texts)} texts for {len(self.choices)} choices: there is one for each, or none.")
        if not self.choices or not all(self.choices):
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
    def target(self) -> str:
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
        _refuse_prompt(self.prompt)
        for name in ("answers", "stop"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if not all(self.stop):
            raise TaskError(f"stop {self.stop!r}: an empty text would end every answer before it began.")
        for name in ("max_tokens", "temperature"):
            object.__setattr__(self, name, _whole(getattr(self, name)))
        if not _is_number(self.max_tokens, Integral) or self.max_tokens < 1:
            raise TaskError(f"max_tokens is {self.max_tokens!r}: an answer has at least one token, and a whole number of them.")
        if not _is_number(self.temperature, Real) or not 0 <= self.temperature < math.inf:
            raise TaskError(f"temperature is {self.temperature!r}: a temperature is a finite number, 0 or more.")

    @property
    def target(self) -> str:
        """What follows the prompt where this question is an example that is shown."""
        return f" {self.answers[0]}" if self.answers else ""


Question: TypeAlias = "Choices | Generate"
Ask: TypeAlias = "Callable[[Row], Question | None]"
Judge: TypeAlias = "Callable[[str], bool | None]"


@dataclass(frozen=True)
class Task:
    """`rows` and `shots` may be a dataset of the hub or a file (`Rows`), a list, or a function that returns an iterator.

    name               by which it is asked for and reported
    rows               where the questions lie
    ask                how a row reads; None for a row that is no question (it is counted)
    metrics            see `scoring._answer_metrics.METRICS`; the first is the one that suites average
    shots              where examples to show are taken from; () for none
    fewshot_strategy   "draw": each question draws its own, by its own hash; "first": all are shown the first ones
    description        what stands before everything, once
    fewshot_delimiter  what stands between an example and what follows it
    judge              of an answer in the making: True or False as soon as it is certain, else None; see `metrics` "rate"
    threshold          of the rate of answers that were judged True: is it above or below? Asked no longer than until that is
                       certain
    style              whose prompts these are: "lm_eval" are those of that harness; kept in the record
    version            raised when the prompts or the rules change
    """

    name: str
    rows: Rows | Sequence[Row] | Callable[[], Iterable[Row]]
    ask: Ask
    metrics: tuple[str, ...] = ("accuracy",)
    shots: Rows | Sequence[Row] | Callable[[], Iterable[Row]] = ()
    fewshot_strategy: str = "draw"
    description: str = ""
    fewshot_delimiter: str = "\n\n"
    judge: Judge | None = None
    threshold: float | None = None
    style: str = "own"
    version: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", _texts("metrics", self.metrics))
        if not self.metrics:
            raise TaskError(f"{self} has no metrics, so that nothing could be told of its answers. Give it one: ('accuracy',).")
        if self.fewshot_strategy not in ("draw", "first"):
            raise TaskError(
                f'{self}: fewshot_strategy is {self.fewshot_strategy!r}. Examples are drawn ("draw"), or the first ones shown '
                '("first").'
            )
        if self.threshold is None:
            return
        if not _is_number(self.threshold, Real) or not 0 < self.threshold < 1:
            raise TaskError(f"{self}: threshold is {self.threshold!r}, and a rate is compared with a number between 0 and 1.")
        if self.judge is None or "rate" not in self.metrics:
            raise TaskError(
                f"{self}: a threshold is compared with the rate of answers that were judged True, and there is "
                + ("no judge." if self.judge is None else f"no metric 'rate' among {', '.join(self.metrics)}.")
                + " Give the task a judge and the metric 'rate', or no threshold."
            )

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Suite:
    """Tasks whose first metrics are averaged: each counts the same, or by its number of questions if `weighted`."""

    name: str
    tasks: tuple[Task, ...]
    weighted: bool = False

    def __str__(self) -> str:
        return self.name

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _several("tasks", self.tasks))
        if not self.tasks or not all(isinstance(task, Task) for task in self.tasks):
            raise TaskError(
                f"the suite {self.name} has tasks {list(map(str, self.tasks))}: it has at least one, and each is a Task (see "
                "`tasks.find`)."
            )
        if twice := [name for name, times in Counter(map(str, self.tasks)).items() if times > 1]:
            raise TaskError(
                f"the suite {self.name} has several tasks called {' and '.join(twice)}. Its results are kept by name, so that "
                "one would take the place of the other: give each a name of its own."
            )
        if "average" in map(str, self.tasks):
            raise TaskError(f"a task of the suite {self.name} is called 'average', as its average is. Give it another name.")


def id_of(row: Row) -> str:
    """Sixteen hex digits of a row's content: what it is called in files, and what its draws depend on."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


def by_name(*items: Task | Suite) -> dict[str, Task | Suite]:
    """Tasks and suites by their names: what an entry point of a family leads to (see `pytest_lmeval.registry`)."""
    found = {item.name: item for item in items}
    if len(found) < len(items):
        raise TaskError(f"two of {', '.join(map(str, items))} have the same name, so that one could not be found by it.")
    return found


def _several(name: str, value: Any) -> tuple[Any, ...]:
    """The values as a tuple. A single text is one of letters to Python, and never meant so."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        one = repr(value) if isinstance(value, str) else str(value)  # of a task its name, and not its rows
        raise TaskError(f"{name} is {one}, where several may stand. Write a tuple, with a comma if it is one: ({one},)")
    return tuple(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = _several(name, value)
    for text in texts:
        _refuse_text(f"{name} {texts!r}: each is a text, and one", text)
    return texts


def _refuse_prompt(prompt: Any) -> None:
    _refuse_text("the prompt is a text, and this one", prompt)


def _refuse_text(what: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TaskError(f"{what} is {text!r}, of type {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{what} has half a character, {text[error.start]!r} at {error.start}, which no tokenizer can read. Mend or leave "
            "out its row: such halves are left where a text was cut, or decoded wrongly."
        ) from None


def _whole(value: Any) -> Any:
    """Whole numbers of numpy as Python's own; whatever else there is, as it is."""
    return operator.index(value) if _is_number(value, Integral) else value


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
