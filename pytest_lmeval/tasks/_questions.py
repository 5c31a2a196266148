"""Declare a task: rows, the question that each row makes, the right answer, and the metrics.

def ask(row):
    return Choices(f"Is {row['n']} even?\\nAnswer:", (" no", " yes"), answer=1 - row["n"] % 2)

PARITY = Task("parity", [{"n": n} for n in range(100)], ask)
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pytest_lmeval import registry
from pytest_lmeval.data._formats import Row
from pytest_lmeval.data._rows import Rows
from pytest_lmeval.errors import TaskError, lone_surrogate
from pytest_lmeval.records._metric import Metric
from pytest_lmeval.tasks._rows import guarded

if TYPE_CHECKING:
    from pytest_lmeval.models._model import Model

SEVERAL = ("pass@", "pass^", "maj@")
"""How the names of metrics of several answers to a question begin."""


def of_several(metric: str) -> bool:
    """Whether the metric of this name is computed from several answers to a question."""
    return metric.startswith(SEVERAL)


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
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | tuple[int, ...]
    group: str | None = None
    texts: tuple[str, ...] = ()
    answer_prefix: str = ""

    def __post_init__(self) -> None:
        _check_texts(self)
        _check_group(self.group)
        for name in ("choices", "texts"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        several = isinstance(self.answer, tuple)
        object.__setattr__(self, "answer", tuple(map(_as_int, self.answers)) if several else _as_int(self.answer))
        if self.texts and len(self.texts) != len(self.choices):
            raise TaskError(f"{len(self.texts)} texts for {len(self.choices)} choices: there is one for each, or none.")
        if not self.choices or not all(self.choices):
            raise TaskError(f"choices {list(self.choices)!r}: a question has at least one, and each has text to be scored.")
        for answer in self.answers:
            if not _is_number(answer, int) or not 0 <= answer < len(self.choices):
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
            object.__setattr__(self, name, _as_int(getattr(self, name)))
        if not _is_number(self.max_tokens, Integral) or self.max_tokens < 1:
            raise TaskError(f"max_tokens is {self.max_tokens!r}: an answer has a whole number of tokens, at least one.")
        if not _is_number(self.temperature, Real) or not 0 <= self.temperature < math.inf:
            raise TaskError(f"temperature is {self.temperature!r}: it is a finite number, 0 or more.")
        object.__setattr__(self, "top_k", _as_int(self.top_k))
        if not _is_number(self.top_k, int) or self.top_k < 0:
            raise TaskError(f"top_k is {self.top_k!r}: it is a number of tokens, or 0 for all.")
        if not _is_number(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise TaskError(f"top_p is {self.top_p!r}: it is a probability, above 0 and at most 1.")
        if not _is_number(self.min_p, Real) or not 0 <= self.min_p < 1:
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
Ask: TypeAlias = "Callable[[Row], AnyQuestion | None]"
Judge: TypeAlias = "Callable[[str], bool | None]"


@dataclass(frozen=True)
class Setting:
    """How a task is asked that another harness prepares.

    lm        the model that is asked
    shots     few-shot examples; None: as many as the task says
    limit     the first rows only
    data_dir  a mirror to read data from
    trusted   it may run code that the model writes
    say       prints a line at once
    in_turns  by the chat template of the model, with this `system` prompt
    """

    lm: Model
    shots: int | None = None
    limit: int | None = None
    data_dir: str | Path | None = None
    trusted: bool = False
    say: Callable[[str], None] | None = None
    in_turns: bool = False
    system: str | None = None


Combine: TypeAlias = "Callable[[str], tuple[Callable[[list[Any]], float], bool | None]]"


@dataclass(frozen=True)
class Extracted:
    """What a scorer took from an answer as the answer proper, beside what it says of it (see `Task.score`).

    text   such as "42"; what the examples show, and what a majority of several answers is counted of
    score  True or 1 for a right answer, False or 0 for a wrong one, or another finite number
    """

    text: str
    score: bool | float


Score: TypeAlias = "bool | float | Extracted | Mapping[str, bool | float | Extracted | None] | None"
Scorer: TypeAlias = "Callable[[Row, str], Score]"


@dataclass(frozen=True)
class Task:
    """A task. `rows` and `shots` are a dataset of the hub or a file (`Rows`, or its name), a list, or a function that returns
    an iterator. The first row of a list is asked at once, so that a metric that cannot be computed is refused here.

    name               by which it is found and reported
    rows               one question each
    ask                row -> question; None for a row that is none (counted)
    metrics            names of metrics of answers (`lmeval list metrics`); suites average the first. By default, as the first
                       question says: accuracy of choices; of generated answers exact_match, or rate where there is a judge.
                       Those of a `score` come before these, and by default alone (or beside rate)
    shots              rows of few-shot examples; () for none
    fewshot_strategy   "draw": each question draws its own, by its hash; "first": all show the first ones
    description        text before everything, once
    fewshot_delimiter  text after each few-shot example
    judge              generated text so far -> True or False as soon as that is certain, else None; see the metric "rate"
    score              (row, answer) -> what the finished answer is worth: of the generated text, stripped, or the text of the
                       chosen choice. A truth value or number is the metric `score`; several by name are one metric each, the
                       same names on every row; None: nothing can be taken from the answer, which counts as 0. A number may come
                       as `Extracted`. `tasks.scores` has ready ones
    thinking           texts between which the model thinks, ("<think>", "</think>"), or None; "auto": those that its tokenizer
                       knows. A thought is no part of an answer: no stop ends it, and no judge, metric or scorer sees it
    most_cut_off       largest share of generated answers that may be cut off (see `Example`); of more, metrics that judge or
                       compare answers are not measured. A tenth is what the interval of a hundred answers leaves open anyway
    repeats            answers to each question, if they are drawn, each with random numbers of its own. The metrics pass@K (one
                       of K is right), pass^K (all are) and maj@K (what most of K say is) are of them, K from 1 to `repeats`
    threshold          is the rate of answers judged True above or below it? Asking ends as soon as that is certain
    style              whose prompts these are, recorded: "lm_eval" are those of that harness, whose rule for ties is kept too
    version            raised when the prompts or the rules change
    special_tokens     whether special tokens that are written in prompts and choices, "<|im_end|>", are read as control tokens,
                       and not as the characters that they are

    Of a task that another harness prepares:

    prepare            how it is asked -> the task with its rows, whose questions are `Requests`
    shown              few-shot examples that stand in its prompts already
    combine            a metric of `Requests.score` -> what makes one number of those of all rows, and whether more is better
    """

    name: str
    rows: Rows | Sequence[Row] | Callable[[], Iterable[Row]]
    ask: Ask
    metrics: tuple[str, ...] | None = None
    shots: Rows | Sequence[Row] | Callable[[], Iterable[Row]] = ()
    fewshot_strategy: str = "draw"
    description: str = ""
    fewshot_delimiter: str = "\n\n"
    judge: Judge | None = None
    score: Scorer | None = None
    thinking: tuple[str, str] | Literal["auto"] | None = "auto"
    most_cut_off: float = 0.1
    repeats: int = 1
    threshold: float | None = None
    style: str = "own"
    version: int = 1
    special_tokens: bool = False
    prepare: Callable[[Setting], Task] | None = None
    shown: int = 0
    combine: Combine | None = None

    def __post_init__(self) -> None:
        if self.metrics is not None:
            object.__setattr__(self, "metrics", texts("metrics", self.metrics))
            if not self.metrics:
                raise TaskError(f"{self} has no metrics. Give it at least one: ('accuracy',).")
        for name in ("description", "fewshot_delimiter"):
            _check_text(f"{self}: {name} is a text, and this one", getattr(self, name))
        for name in ("rows", "shots"):
            object.__setattr__(self, name, _rows(f"{self}: {name}", getattr(self, name)))
        for name in ("ask", "judge", "score"):
            if not callable(given := getattr(self, name)) and (name == "ask" or given is not None):
                raise TaskError(f"{self}: {name} is {given!r}, of type {type(given).__name__}; it is a function.")
        if self.fewshot_strategy not in ("draw", "first"):
            raise TaskError(f"{self}: fewshot_strategy is {self.fewshot_strategy!r}. It is 'draw' or 'first'.")
        if self.thinking is not None and self.thinking != "auto":
            object.__setattr__(self, "thinking", texts(f"{self}: thinking", self.thinking))
            if len(self.thinking) != 2 or not all(self.thinking):
                raise TaskError(
                    f"{self}: thinking is {self.thinking!r}: two texts, as ('<think>', '</think>'), 'auto' or None."
                )
        if not _is_number(self.most_cut_off, Real) or not 0 <= self.most_cut_off <= 1:
            raise TaskError(f"{self}: most_cut_off is {self.most_cut_off!r}. A share of answers lies between 0 and 1.")
        object.__setattr__(self, "repeats", _as_int(self.repeats))
        if not _is_number(self.repeats, int) or self.repeats < 1:
            raise TaskError(f"{self}: repeats is {self.repeats!r}. It is a whole number of answers, at least one.")
        for name in filter(of_several, self.metrics or ()):
            count = name.replace("^", "@").partition("@")[2]
            if not (count.isdecimal() and 1 <= int(count) <= self.repeats):
                what = f"{self}: {name} is a metric of {count or 'no'} answers to each question"
                raise TaskError(f"{what}, and repeats={self.repeats}. It is of 1 to `repeats` answers.")
        if self.repeats > 1 and self.threshold is not None:
            raise TaskError(f"{self}: a threshold is for independent answers, and repeats={self.repeats} of one row are not.")
        if self.judge is None and "rate" in (self.metrics or ()):
            raise TaskError(f"{self}: the metric 'rate' is the fraction of answers judged True, and there is no judge.")
        if self.score is None and "score" in (self.metrics or ()):
            raise TaskError(f"{self}: the metric 'score' is what the task's `score` says of an answer, and there is none.")
        if self.threshold is not None:
            if not _is_number(self.threshold, Real) or not 0 < self.threshold < 1:
                raise TaskError(f"{self}: threshold is {self.threshold!r}. A rate is compared with a number between 0 and 1.")
            if self.judge is None or (self.metrics is not None and "rate" not in self.metrics):
                lacks = "no judge" if self.judge is None else f"no metric 'rate' among {', '.join(self.metrics or ())}"
                raise TaskError(f"{self}: a threshold is for the rate of answers judged True, and there is {lacks}.")
        if isinstance(self.rows, list | tuple) and self.rows:
            self._check_first(self.rows[0])

    def __str__(self) -> str:
        return self.name

    @property
    def tie_rule(self) -> Literal["shared", "first"]:
        """What a tie counts (see `Example`): the first of equal choices all, where the numbers of lm_eval are promised."""
        return "first" if self.style == "lm_eval" else "shared"

    def metrics_for(self, question: AnyQuestion, where: str) -> tuple[str, ...]:
        """The names of the metrics; the default ones are chosen for this question. Raises TaskError if there is none."""
        if isinstance(question, Requests):  # what it measures is known when it is scored
            return ()
        own = self.metrics or ()
        if own and (self.score is not None or not self.only_of_several):
            return own
        return (*self._default_metrics(question, where), *own)

    @property
    def only_of_several(self) -> bool:
        """All metrics are of several answers to a question: what says that one is right is the default metric."""
        return self.metrics is not None and all(map(of_several, self.metrics))

    def _default_metrics(self, question: Question, where: str) -> tuple[str, ...]:
        if self.score is not None:
            return () if self.judge is None else ("rate",)
        if isinstance(question, Choices):
            return ("accuracy",)
        if self.judge is None and not question.answers:
            raise TaskError(
                f"{self}, {where}: its answer is generated, with answers=() to compare it with and no judge, so nothing says "
                "what is right. Give `answers`, a `score`, a `judge`, or a metric that needs none (`lmeval list metrics`)."
            )
        return ("exact_match",) if self.judge is None else ("rate",)

    def check(self, question: AnyQuestion, metrics: Iterable[Metric], where: str) -> None:
        """Raise TaskError if one of the metrics cannot be computed from the answer to this question."""
        if isinstance(question, Requests):
            return
        if isinstance(question, Choices):
            choices, right, targets = question.choices, question.answers, question.choices
            has = f"this question has the choices {list(choices)!r}, of which {list(right)} are right"
        else:
            choices, right, targets = (), (), question.answers
            has = f"the answer to this question is generated, with answers={targets!r} to compare it with"
        for metric in metrics:
            if not metric.can_score(choices, right, targets):
                raise TaskError(
                    f"{self}, {where}: {metric} is computed from {metric.needs}, and {has}. Ask for another metric (`lmeval "
                    "list metrics`): accuracy is one of choices, exact_match of generated answers, rate of those of a judge."
                )

    def _check_first(self, row: Row) -> None:
        """Check the first question of rows that are at hand. Another row, another package's metric, and any other failure of
        `ask` are checked when the question is asked."""
        try:
            question = self.ask(guarded(row))
        except Exception:  # noqa: BLE001 - raised again, with its row, when it is asked
            return
        if isinstance(question, Choices | Generate):
            known = registry.own("metrics")
            self.check(question, [known[name] for name in self.metrics_for(question, "row 0") if name in known], "row 0")


@dataclass(frozen=True)
class Average:
    """An average over tasks of a suite that another harness declares.

    metric    what is averaged, where a task has it
    tasks     their names
    weighted  by the number of their questions
    filters   those of the answers that count: "strict-match"; None: each that a task has
    within    the name of the group inside of the suite; empty: the suite itself
    """

    metric: str
    tasks: tuple[str, ...]
    weighted: bool = False
    filters: tuple[str, ...] | None = None
    within: str = ""


@dataclass(frozen=True)
class Suite:
    """Tasks whose first metrics are averaged, each with the same weight, or with its number of questions if `weighted`; or
    whose `averages` another harness declares."""

    name: str
    tasks: tuple[Task, ...]
    weighted: bool = False
    averages: tuple[Average, ...] | None = None

    def __str__(self) -> str:
        return self.name

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _several("tasks", self.tasks))
        names = list(map(str, self.tasks))
        if not self.tasks or not all(isinstance(task, Task) for task in self.tasks):
            raise TaskError(f"the suite {self} has tasks {names}: it has at least one, and each is a Task (see `tasks.find`).")
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise TaskError(f"the suite {self} has several tasks called {' and '.join(twice)}. Results are kept by name.")
        if "average" in names:
            raise TaskError(f"a task of the suite {self} is called 'average', as its average is. Give it another name.")


def by_name(*items: Task | Suite) -> dict[str, Task | Suite]:
    """Tasks and suites by their names: the object of a family's entry point (see `pytest_lmeval.registry`)."""
    found = {item.name: item for item in items}
    if len(found) < len(items):
        raise TaskError(f"two of {', '.join(map(str, items))} have the same name, so only one would be found.")
    return found


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Several texts as a tuple. Raises TaskError, with the name, for a single text and for a value among them that is none."""
    found = _several(name, value)
    for text in found:
        _check_text(f"{name} {found!r}: each is a text, and one", text)
    return found


def _several(name: str, value: Any) -> tuple[Any, ...]:
    """The values as a tuple. A single text is refused: Python would take it for a sequence of letters. So is what has no order,
    or is a sequence of names or numbers."""
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        one = repr(value) if isinstance(value, str | bytes | Mapping | Set) else str(value)  # a task's name instead of its rows
        raise TaskError(f"{name} is {one}, which is not a sequence. Write a tuple, with a comma if it is one: ({one},)")
    return tuple(value)


def _rows(what: str, rows: Any) -> Any:
    """Rows that can be read more than once; a name is that of a dataset or a file."""
    if isinstance(rows, str):
        return Rows(rows)
    if isinstance(rows, Iterator) or not (callable(rows) or isinstance(rows, Rows | Iterable)):
        once = " It can be read once, and rows are read again: give a list, or the function that makes it."
        why = once if isinstance(rows, Iterator) else " Give a list, Rows(...), or a function that returns an iterator."
        raise TaskError(f"{what} is {rows!r}, of type {type(rows).__name__}.{why}")
    return rows


def _check_text(what: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TaskError(f"{what} is {text!r}, of type {type(text).__name__}.")
    if wrong := lone_surrogate(text):
        raise TaskError(f"{what} has {wrong}")


def _check_texts(question: Choices | Generate) -> None:
    _check_text("the prompt is a text, and this one", question.prompt)
    _check_text("the answer_prefix is a text, and this one", question.answer_prefix)


def _check_group(group: Any) -> None:
    if group is not None:
        _check_text("the group is a text, or None, and this one", group)


def _as_int(value: Any) -> Any:
    """An integer of numpy as one of Python; any other value unchanged."""
    return operator.index(value) if _is_number(value, Integral) else value


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
