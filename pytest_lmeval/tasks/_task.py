"""Declare a task: rows, the question that each row makes, the right answer, and the metrics.

def ask(row):
    return Choices(f"Is {row['n']} even?\\nAnswer:", (" no", " yes"), answer=1 - row["n"] % 2)

PARITY = Task("parity", [{"n": n} for n in range(100)], ask)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pytest_lmeval import registry
from pytest_lmeval.data._formats import Row
from pytest_lmeval.data._rows import Rows
from pytest_lmeval.errors import TaskError
from pytest_lmeval.records._metric import Metric
from pytest_lmeval.tasks._checks import as_int, check_text, is_number, template_kwargs, texts
from pytest_lmeval.tasks._questions import AnyQuestion, Choices, Generate, Question, Requests
from pytest_lmeval.tasks._rows import guarded

if TYPE_CHECKING:
    from pytest_lmeval.models._model import Model


SEVERAL = ("pass@", "pass^", "maj@")
"""How the names of metrics of several answers to a question begin."""


def of_several(metric: str) -> bool:
    """Whether the metric of this name is computed from several answers to a question."""
    return metric.startswith(SEVERAL)


@dataclass(frozen=True)
class Extracted:
    """What a scorer took from an answer as the answer proper, beside what it says of it (see `Task.score`).

    text   such as "42"; what the examples show, and what a majority of several answers is counted of
    score  True or 1 for a right answer, False or 0 for a wrong one, or another finite number
    """

    text: str
    score: bool | float


Ask: TypeAlias = "Callable[[Row], AnyQuestion | None]"
Judge: TypeAlias = "Callable[[str], bool | None]"
Score: TypeAlias = "bool | float | Extracted | Mapping[str, bool | float | Extracted | None] | None"
Scorer: TypeAlias = "Callable[[Row, str], Score]"
Combine: TypeAlias = "Callable[[str], tuple[Callable[[list[Any]], float], bool | None]]"


@dataclass(frozen=True)
class Setting:
    """How a task is asked that another harness prepares.

    lm        the model that is asked
    shots     few-shot examples; None: as many as the task says
    limit     the first rows only
    data_dir  a mirror to read data from
    trusted   it may run code that the model writes
    say       prints a line at once
    in_turns  by the chat template of the model, which has its keywords, with this `system` prompt
    """

    lm: Model
    shots: int | None = None
    limit: int | None = None
    data_dir: str | Path | None = None
    trusted: bool = False
    say: Callable[[str], None] | None = None
    in_turns: bool = False
    system: str | None = None


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
    train              rows to fine-tune on; None: those of `shots`
    classes            choices that are the same for every row are classes, on which a fine-tuning may put a head; False: they
                       are letters of texts in the prompt, compared by likelihood
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
    chat_template_kwargs  keywords of the chat template, where the task is asked in turns: {"enable_thinking": False}, or
                       {"chat_template": "tool_use"} for one of several that the tokenizer has by name
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
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    prepare: Callable[[Setting], Task] | None = None
    shown: int = 0
    combine: Combine | None = None
    train: Rows | Sequence[Row] | Callable[[], Iterable[Row]] | None = None
    classes: bool = True

    def __post_init__(self) -> None:
        if self.metrics is not None:
            object.__setattr__(self, "metrics", texts("metrics", self.metrics))
            if not self.metrics:
                raise TaskError(f"{self} has no metrics. Give it at least one: ('accuracy',).")
        for name in ("description", "fewshot_delimiter"):
            check_text(f"{self}: {name} is a text, and this one", getattr(self, name))
        for name in ("rows", "shots", "train"):
            if (given := getattr(self, name)) is not None or name != "train":
                object.__setattr__(self, name, _rows(f"{self}: {name}", given))
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
        if not is_number(self.most_cut_off, Real) or not 0 <= self.most_cut_off <= 1:
            raise TaskError(f"{self}: most_cut_off is {self.most_cut_off!r}. A share of answers lies between 0 and 1.")
        object.__setattr__(self, "chat_template_kwargs", template_kwargs(str(self), self.chat_template_kwargs))
        object.__setattr__(self, "repeats", as_int(self.repeats))
        if not is_number(self.repeats, int) or self.repeats < 1:
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
            if not is_number(self.threshold, Real) or not 0 < self.threshold < 1:
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
        return tie_rule(self.style)

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


def tie_rule(style: str) -> Literal["shared", "first"]:
    """What a tie counts in a task of this style."""
    return "first" if style == "lm_eval" else "shared"


def _rows(what: str, rows: Any) -> Any:
    """Rows that can be read more than once; a name is that of a dataset or a file."""
    if isinstance(rows, str):
        return Rows(rows)
    if isinstance(rows, Iterator) or not (callable(rows) or isinstance(rows, Rows | Iterable)):
        once = " It can be read once, and rows are read again: give a list, or the function that makes it."
        why = once if isinstance(rows, Iterator) else " Give a list, Rows(...), or a function that returns an iterator."
        raise TaskError(f"{what} is {rows!r}, of type {type(rows).__name__}.{why}")
    return rows
