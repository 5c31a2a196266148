"""Ask a task to its end: its questions as the model reads them, block by block, and what was read for each.

    row -> question -> prompt after its few-shot examples -> token ids    `Asking.questions`, row by row
        -> log-likelihoods of the choices, or a generated answer          `_answers`: the engine, block by block; kept as read
        -> example, scored in each metric                                 `_task_examples.example_of`

No answer depends on the others, or on their order or number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from msgspec import structs

from pytest_lmeval.engine import Answer, Engine, Prompt, Request, Scored
from pytest_lmeval.errors import TaskError
from pytest_lmeval.measures._task_audit import Answered, TaskAudit
from pytest_lmeval.measures._task_examples import example_of
from pytest_lmeval.measures._task_record import number_of_questions
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._metric import Metric, judge_of
from pytest_lmeval.records._share import WHOLE, Share
from pytest_lmeval.scoring._answers import AnswerStore
from pytest_lmeval.scoring._chat import Chat, ChatMode, Decision, decide
from pytest_lmeval.scoring._encoded import EncodedQuestion
from pytest_lmeval.scoring._fewshot import Fewshot, Shots, identity_of, question_of, rows_of
from pytest_lmeval.scoring._metrics import combined_metrics, metrics_of
from pytest_lmeval.scoring._requests import Encoder, Truncate
from pytest_lmeval.scoring._row_scores import ONE, check_names, row_metrics, score_by_row
from pytest_lmeval.scoring._several import with_several
from pytest_lmeval.statistics import _sequential as sequential
from pytest_lmeval.tasks._questions import AnyQuestion, Generate, Requests
from pytest_lmeval.tasks._rows import guarded
from pytest_lmeval.tasks._task import Judge, Task

BATCHES = 16  # in a block after the first: more questions share more, and a first block of one batch shows progress at once
BLOCK_TOKENS = 1 << 16  # of the prompts of a block, at most: progress is shown, and answers are audited, block by block

Place: TypeAlias = "tuple[int, int]"
"""The index of a row, and which answer to it (`EncodedQuestion.place`)."""

Progress = Callable[[int, float, "int | None"], None]
"""Called after each block with the questions answered, those answered right (nan: nobody judges them), and the questions
expected (None: unknown)."""


@dataclass(frozen=True)
class Questions:
    """The questions of a task as a model reads them.

    metrics        that are computed from them: those of the task, or the default ones for the first question
    encoded        the questions, each made when it is asked for; raises TaskError if a metric cannot be computed from one
    not_questions  indices of the rows so far that are none
    """

    metrics: list[Metric]
    encoded: Iterator[EncodedQuestion]
    not_questions: list[int]


@dataclass(frozen=True)
class Asking:
    """A task, and how it is asked: the fields are those of `measure_task`."""

    task: Task
    shots: int = 0
    limit: int | None = None
    fewshot: Fewshot = "document"
    truncate: Truncate = "left"
    seed: int = 0
    data_dir: str | Path | None = None
    chat: ChatMode = False
    system: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    share: Share = WHOLE

    def in_turns(self, lm: Model) -> Decision:
        """Whether it is asked in turns."""

        def first() -> AnyQuestion | None:
            asked = (question_of(self.task, row, where) for where, row in rows_of(self.task.rows, self.data_dir))
            return next((question for question in asked if question is not None), None)

        return decide(self.chat, lm, self.task, first, self.system)

    def questions(self, lm: Model) -> Questions:
        task, not_questions = self.task, list[int]()

        def asked() -> Iterator[tuple[int, str, Any, Any]]:
            for number, (where, row) in enumerate(rows_of(task.rows, self.data_dir)):
                question = question_of(task, row, where)
                if question is None:
                    not_questions.append(number)
                else:
                    yield number, where, row, question

        found, names = asked(), task.metrics
        if names is None or (task.only_of_several and task.score is None):
            first = list(islice(found, 1))
            names = next((task.metrics_for(question, where) for _, where, _, question in first), ())
            found = chain(first, found)
        others = [name for name in names if name != ONE]  # that of a scorer is known when it has scored an answer
        known = ["cut_off"] if task.combine is not None else list(dict.fromkeys((*others, "chance", "cut_off")))
        metrics = metrics_of(known, task.name)
        chat = Chat(lm, task, self.system or "") if self.in_turns(lm).on else None
        encoder = Encoder(lm, task, self.truncate, self.seed, chat)
        shots = Shots(task, self.shots, self.fewshot, data_dir=self.data_dir, seed=self.seed)

        def encoded() -> Iterator[EncodedQuestion]:
            for number, where, row, question in islice(found, self.limit):
                own = identity_of(task, row, where)
                if not self.share.owns(own):
                    shots.pass_over(row, own)
                    continue
                task.check(question, metrics, where)
                one = encoder.encode(question, task.description, shots.questions(row, own), id=own, number=number)
                drawn = isinstance(question, Generate) and (question.temperature > 0 or lm.served is not None)
                one = one if task.score is None else replace(one, row=guarded(row))
                yield from one.repeated(task.repeats if drawn else 1)

        return Questions(metrics, encoded(), not_questions)


@dataclass(eq=False)
class TaskReading:
    """The answers to a task, up to a question.

    answered            examples so far, in the order of their questions
    resumed             how many of them an earlier call had read, and `from_other_batches` in batches of another shape
    with_special        questions in whose texts special tokens are written
    generation          how answers are generated, in words
    thinking            the texts between which the model thinks, if it does
    by_row              the metrics that the scorer of the task, or another harness, gives, once it has scored an answer
    verdict             whether the rate of right answers is "above" or "below" the threshold of the task, once that is certain
    values              of a task that another harness scores: its numbers by row
    """

    engine: Engine
    asking: Asking
    store: AnswerStore
    progress: Progress | None = None
    answered: list[Example] = field(default_factory=list)
    resumed: int = 0
    from_other_batches: int = 0
    with_special: int = 0
    generation: set[str] = field(default_factory=set)
    thinking: set[str] = field(default_factory=set)
    by_row: dict[str, Metric] = field(default_factory=dict)
    verdict: str | None = None
    values: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.questions = self.asking.questions(self.engine.lm)
        self.audit = TaskAudit(self.engine, str(self.asking.task), self.store)
        self._confirmed = False

    @property
    def metrics(self) -> list[Metric]:
        return [*self.by_row.values(), *self.questions.metrics]

    def to_the_end(self) -> None:
        """Ask all questions, or until the rate is certain. Raises Refused if an answer depends on the others (`TaskAudit`)."""
        task = self.asking.task
        for block in _blocks(self.questions.encoded, self.engine.asked.batch_size, grow=task.threshold is None):
            self._ask(block)
            if task.threshold is not None and (verdict := _certain(task.threshold, self.answered)):
                self.verdict = verdict
                break
        self.audit.end(self.answered)
        self.answered = [self.audit.audited.get(example.place, example) for example in self.answered]
        if task.score is not None:
            self.by_row = self.by_row or row_metrics(task, ["score"], self.questions.metrics)
            refused = dict.fromkeys(self.by_row, 0.0)
            self.answered = [structs.replace(example, scores=refused | example.scores) for example in self.answered]
        self.answered = with_several(self.answered, self.metrics, self.asking.task)
        if not self.answered and self.asking.share.is_whole:
            read = len(self.questions.not_questions)
            raise TaskError(f"{task} has no question: {read} row(s) were read, and none was one.")
        if task.combine is not None:
            self.by_row = {metric.name: metric for metric in combined_metrics(task.combine, self.values)}
            no_means = {name for name, metric in self.by_row.items() if metric.score is None}
            self.answered = [_without(example, no_means) for example in self.answered]

    def _ask(self, block: list[EncodedQuestion]) -> None:
        """Read what the store does not hold of a block; results from other batches do not change those of the others."""
        self.store.begin(block)
        other = [one for one in block if self.store.from_other_batches(one)]
        places = {one.place for one in other}
        read = [
            answer
            for some in (other, [one for one in block if one.place not in places])
            for answer in _answers(self.engine, some, self.questions.metrics, self.asking.task, self.asking.seed, self.store)
        ]
        if self.asking.task.score is not None:
            rows = {one.number: one.row for one in block}
            read = [replace(answer, example=self._scored_by_row(answer.example, rows)) for answer in read]
        read.sort(key=lambda answer: answer.example.place)
        if not self._confirmed and (earlier := [answer for answer in read if answer.earlier]):
            self.audit.confirm(earlier)
            self._confirmed = True
        self.answered += [answer.example for answer in read]
        self.values |= {answer.example.number: answer.values for answer in read if answer.values}
        self.audit.block(read, self.answered)
        self.from_other_batches += len(other)
        self.resumed += sum(answer.kept for answer in read)
        self.with_special += sum(one.special for one in block)
        self.generation |= {
            ", ".join(
                [
                    f"at most {way.max_tokens} tokens, temperature {way.temperature:g}",
                    *(f"{name} {value:g}" for name, value in way.drawn_from.items()),
                    f"until {list(way.stop)!r}",
                ]
            )
            for one in block
            for way in (one.question.generated if isinstance(one.question, Requests) else (one.question,))
            if isinstance(way, Generate)
        }
        self.thinking |= {text for one in block for text in one.thinking or ()}
        if self.progress is not None:
            judge = judge_of(self.metrics)
            scores = [example.scores.get(judge.name) or 0.0 for example in self.answered] if judge else []
            right = sum(min(max(score, 0.0), 1.0) for score in scores) if judge else math.nan
            questions = len({example.number for example in self.answered})
            expected = number_of_questions(self.asking.task, self.asking.limit)
            expected = None if expected is None else max(questions, round(expected / self.asking.share.count))
            self.progress(questions, right * questions / len(self.answered), expected)

    def _scored_by_row(self, example: Example, rows: dict[int, Any]) -> Example:
        """The example with what the scorer of the task says. Its first scores say which metrics there are."""
        task = self.asking.task
        found = score_by_row(task, rows[example.number], example)
        if found.scores:
            self.by_row = self.by_row or row_metrics(task, [*found.scores], self.questions.metrics)
            check_names(task, example, found, self.by_row)
        return found.put_into(example)


def _without(example: Example, names: Set[str]) -> Example:
    """The example without the scores of metrics that are no means of them, so that nothing adds them up."""
    return structs.replace(example, scores={name: score for name, score in example.scores.items() if name not in names})


def _blocks(questions: Iterator[EncodedQuestion], batch_size: int, *, grow: bool) -> Iterator[list[EncodedQuestion]]:
    """Blocks of one batch; if they `grow`, the first is one batch and the others up to 16."""
    block: list[EncodedQuestion] = []
    size, tokens = batch_size, 0
    for question in questions:
        block.append(question)
        tokens += max(len(request.ids) for request in question.requests)
        if len(block) == size or tokens >= BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
            size = BATCHES * batch_size if grow else size
    if block:
        yield block


def _answers(
    engine: Engine, some: Sequence[EncodedQuestion], metrics: list[Metric], task: Task, seed: int, store: AnswerStore
) -> Iterator[Answered]:
    """The answered and scored questions, in their order, each with what was read for it."""
    scores, there = _scores(engine, some, store)
    answers, prompts, also_there = _generated(engine, some, task, seed, store)
    for one in some:
        likelihoods, texts = scores.get(one.place, []), answers.get(one.place, [])
        example, values = example_of(one, likelihoods, texts, metrics, task, engine.lm)
        readings = [(request, scored.loglikelihood) for request, scored in zip(one.scored, likelihoods, strict=True)]
        for answer in texts:
            if answer.logprobs:
                request = Request(np.concatenate([answer.prompt.ids, answer.ids]), len(answer.prompt.ids))
                readings.append((request, np.array(answer.logprobs)))
        yield Answered(
            example,
            readings,
            next(iter(prompts.get(one.place, [])), None),
            one.place in there or one.place in also_there,
            store.is_earlier(one),
            values,
        )


def _scores(
    engine: Engine, some: Sequence[EncodedQuestion], store: AnswerStore
) -> tuple[dict[Place, list[Scored]], set[Place]]:
    """The likelihoods that each question asks for, by its place; and the places of those that were there, whole."""
    asked = [one for one in some if one.scored]
    if not asked:
        return {}, set()
    results = store.scored(asked)
    owners = [one.place for one in asked for _ in one.scored]
    read = {owner for number, owner in enumerate(owners) if number not in results.found}
    likelihoods = iter(engine.score([request for one in asked for request in one.scored], results))
    return {one.place: [next(likelihoods) for _ in one.scored] for one in asked}, {one.place for one in asked} - read


def _generated(
    engine: Engine, some: Sequence[EncodedQuestion], task: Task, seed: int, store: AnswerStore
) -> tuple[dict[Place, list[Answer]], dict[Place, list[Prompt]], set[Place]]:
    """The answers that each question asks for, by its place, and their prompts; and the places of those that were there."""
    asked = [one for one in some if one.answers]
    if not asked:
        return {}, {}, set()
    prompts = {one.place: _prompts(one, seed) for one in asked}
    flat = [prompt for one in asked for prompt in prompts[one.place]]
    owners = [one for one in asked for _ in range(one.answers)]
    judged = None if task.judge is None else _judging(task.judge, [one.id for one in owners])
    results = store.answers(asked, flat, judged)
    there = {owners[number].place for number in results.found}
    found = iter(engine.generate(flat, judged, results))
    return {one.place: [next(found) for _ in range(one.answers)] for one in asked}, prompts, there


def _prompts(one: EncodedQuestion, seed: int) -> list[Prompt]:
    """The prompts of a question; each of several answers has random numbers of its own."""
    ways = one.question.generated if isinstance(one.question, Requests) else (one.question,)
    thinking = one.thinking
    return [
        Prompt(
            request.ids,
            one.id,
            way.max_tokens,
            way.stop,
            way.temperature,
            seed,
            thinking,
            thinking is not None and one.prompt.rstrip().endswith(thinking[0]),
            way.top_k,
            way.top_p,
            way.min_p,
            one.repeat + number,
        )
        for number, (request, way) in enumerate(zip(one.requests[len(one.scored) :], ways, strict=True))
        if isinstance(way, Generate)
    ]


def _judging(judge: Judge, names: Sequence[str]) -> Callable[[int, str], bool | None]:
    """The judge as the engine calls it, for rows of these names; its errors name the row."""

    def judged(number: int, text: str) -> bool | None:
        row = names[number]
        try:
            verdict = judge(text)
        except Exception as error:
            raise TaskError(f"the judge raised {type(error).__name__}: {error}, on row {row}: {text[-200:]!r}.") from error
        if verdict is not None and not isinstance(verdict, bool | np.bool_):
            raise TaskError(f"the judge returned {verdict!r} for row {row}. Return True, False, or None while uncertain.")
        return None if verdict is None else bool(verdict)

    return judged


def _certain(threshold: float, examples: Sequence[Example]) -> str | None:
    """Whether the rate of answers judged True is "above" or "below" the threshold; None while neither is certain."""
    if groups := [example.group for example in examples if example.group is not None]:
        why = "depend on one another, and a threshold is for independent ones"
        raise TaskError(f"answers of one group ({groups[0]}) {why}. Leave out `group` or `threshold`.")
    return sequential.verdict(sum(example.judged is True for example in examples), len(examples), threshold)
