"""A task, asked, and what its answers come to: the way from a row to a metric.

    row -> question -> prompt with its examples -> token ids     `asked_of`: the task, `Shots` and `Encoder`, row by row
        -> log-likelihoods, or an answer in words                `TaskRun.blocks`: the engine, block by block
        -> example, scored in each metric                        `scored`, and written to the file of answers
        -> metrics with intervals -> record                      `measure_task`

Questions are made as they are needed and asked in blocks. The first block is one batch, so that the first answers are there at
once; later ones are larger, since more of them share more. No answer depends on the block that its question stood in, nor on
the order or the number of questions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from msgspec import structs

from pytest_lmeval.data._rows import Rows
from pytest_lmeval.engine import Engine, Policy, Prompt, Scored, policy_for
from pytest_lmeval.errors import ArgumentError, NotFiniteError, TaskError, nearest
from pytest_lmeval.measures._context import VerbContext, current, verb
from pytest_lmeval.models._identity import facts, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import key_of
from pytest_lmeval.records._measured import Cost, Record, Result
from pytest_lmeval.records._metric import Metric, Norm, judge_of, metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._answers import AnswerFile
from pytest_lmeval.scoring._fewshot import Fewshot, Shots, question_of, rows_of
from pytest_lmeval.scoring._metrics import compute, metrics_of, scored
from pytest_lmeval.scoring._requests import EncodedQuestion, Encoder, Truncate
from pytest_lmeval.statistics import _sequential as sequential
from pytest_lmeval.tasks import find
from pytest_lmeval.tasks._questions import Choices, Generate, Judge, Task, id_of

LARGEST = 16  # batches in a block after the first
BLOCK = 1 << 16  # tokens of the prompts in a block

Progress = Callable[[int, float, "int | None"], None]
"""Called after each block with the questions answered, those answered right, and the questions expected (None: unknown)."""


@verb
def task(
    lm: Any,
    task: Task | str,
    shots: int = 0,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    fewshot: Literal["document", "lm_eval"] = "document",
    truncate: Literal["left", "refuse"] = "left",
    seed: int = 0,
) -> TaskResult:
    """Ask a task, or the one of that name: its metrics with intervals, and every answer in a file (see `measure_task`).

    What questions have in common is read once, as far as the laws that the model was probed for allow it.
    """
    context = current()
    asked = find(task) if isinstance(task, str) else task
    if not isinstance(asked, Task):
        raise ArgumentError(f"a task is a Task, or the name of one; got {asked!r}.")
    model, certificate = context.certified(lm)
    settings: dict[str, Any] = {
        "shots": shots,
        "limit": context.session.limit if limit is None else limit,
        "fewshot": fewshot,
        "truncate": truncate,
        "seed": seed,
    }
    rows = [asked.name, asked.style, _identity_of(context, asked.rows), tokenizer_fingerprint(model)]
    key = context.key("task", model, {**settings, "batch_size": batch_size}, rows)
    written = context.file("examples.jsonl")
    finished = context.journaled(key)  # of an interrupted run: its answers, if the questions are the same
    with context.session.progress(f"{model.spec} answers {asked.name}", unit="questions") as progress:
        result = measure_task(
            model,
            asked,
            **settings,
            policy=policy_for(model, certificate, batch_size=batch_size),
            data_dir=context.session.mirror,
            examples=context.path(written),
            partial=context.path(f"partial/{key}.jsonl"),
            known=context.path(finished.examples if finished else None),
            progress=progress,
        )
    if result.resumed:
        context.log.notes.append(f"{model.spec} on {asked.name}: {result.resumed:,} answers taken from an interrupted run")
    return context.recorded(key, replace(result, record=structs.replace(result.record, examples=written)))


def _identity_of(context: VerbContext, rows: Any) -> str:
    """What the rows of a task are; empty where that cannot be known before they are read."""
    if isinstance(rows, Rows):
        return rows.fingerprint(context.session.mirror)
    return key_of(rows=rows) if isinstance(rows, list | tuple) else ""


@dataclass(frozen=True, repr=False)
class TaskResult(Result):
    """What a task came to. Every metric of the task is an attribute; numbers carry `.low` and `.high`, their 95 % interval.

    resumed  questions that an interrupted run had already asked
    """

    examples: tuple[Example, ...] = ()
    resumed: int = 0

    def __getattr__(self, name: str) -> Value:
        if name.startswith("_") or name not in self.record.metrics:
            known = ", ".join(self.record.metrics)
            raise AttributeError(
                f"{self.record.subject} has no metric {name!r}.{nearest(name, self.record.metrics)} It has {known}."
            )
        return self.record.metrics[name]


def measure_task(
    lm: Model,
    task: Task,
    *,
    policy: Policy | None = None,
    shots: int = 0,
    limit: int | None = None,
    fewshot: Fewshot = "document",
    truncate: Truncate = "left",
    seed: int = 0,
    data_dir: str | Path | None = None,
    examples: str | Path | None = None,
    partial: str | Path | None = None,
    known: str | Path | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Ask a model a task.

    policy    how it is read (see `engine.policy_for`); by default as the model declares that it can be
    shots     examples shown before each question, drawn as `fewshot` says (see `scoring._fewshot`)
    limit     ask so many questions, the first ones
    truncate  "left" takes away what does not fit the model's context, and counts it; "refuse" is an error
    examples  write each answer to this file of JSON lines
    partial   keep answers here until all are there
    known     take answers from this file, too, where model and question are the very same; and from `partial`

    Raises TaskError for a row that cannot be asked, CorpusError for one that cannot be read, NotFiniteError for a likelihood
    that is no number; all name the row, and keep what was answered before.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"limit is {limit}: a task has at least one question.")
    engine = Engine(lm, policy)
    metrics = metrics_of([*task.metrics, *({"chance"} - set(task.metrics))], task.name)
    began = time.perf_counter()
    run = TaskRun(task, metrics, engine, AnswerFile(partial), seed)
    drawn = Shots(task, shots, fewshot, data_dir=data_dir, seed=seed)
    questions = asked_of(run, Encoder(lm, task, truncate, seed), drawn, limit, data_dir)
    for _ in run.blocks(questions, {**AnswerFile(known).read(), **run.file.read()}):
        if progress is not None:
            progress(len(run.examples), float(run.right), _expected(task, limit))
    if not run.examples:
        raise TaskError(f"{task} has no question: {run.no_question} row(s) were read, and none was one.")
    settings = {
        "style": task.style,
        "version": task.version,
        "rows": _named(task.rows),
        "shots": shots,
        "fewshot": task.fewshot_strategy if task.fewshot_strategy == "first" else fewshot,
        "limit": limit,
        "batch_size": engine.policy.batch_size,
        "seed": seed,
        "truncate": truncate,
        **({} if task.threshold is None else {"threshold": task.threshold}),
        "prompts": _prompts(run.examples),
        **({"generation": sorted(run.generation)} if run.generation else {}),
    }
    saved = {} if run.verdict is None else _saved(run, limit, data_dir)
    record = record_of(run, settings, saved, seconds=time.perf_counter() - began)
    run.file.finish(run.examples, examples)
    return TaskResult(
        structs.replace(record, examples=None if examples is None else str(examples)), tuple(run.examples), run.resumed
    )


@dataclass
class TaskRun:
    """A task on the way, and what is counted of it.

    metrics      that its answers are counted in
    examples     the answers so far, scored, in the order of their questions
    resumed      how many of them an interrupted run had given
    right        how many are right, by the first metric that says so of an answer
    generation   the ways in which answers were generated
    no_question  rows that were none
    verdict      above or below the threshold, as soon as that is certain
    """

    task: Task
    metrics: list[Metric]
    engine: Engine
    file: AnswerFile
    seed: int = 0
    examples: list[Example] = field(default_factory=list)
    resumed: int = 0
    right: float = 0.0
    generation: set[str] = field(default_factory=set)
    no_question: int = 0
    verdict: str | None = None

    def blocks(self, questions: Iterator[EncodedQuestion], known: dict[int, Example]) -> Iterator[None]:
        """Ask the questions, block by block, but for those whose very answer is `known`. Ends early with a verdict."""
        judge = judge_of(self.metrics)
        for block in in_blocks(questions, self.engine.policy.batch_size, grow=self.task.threshold is None):
            fresh = [asked for asked in block if (old := known.get(asked.number)) is None or old.key != asked.key]
            found = {example.number: example for example in self._answers(fresh)}
            self.file.append(found[asked.number] for asked in fresh)
            answered = [found.get(asked.number) or self._scored(known[asked.number]) for asked in block]
            self.examples += answered
            self.resumed += len(block) - len(fresh)
            self.right += sum((judge is not None and example.scores[judge.name]) or 0.0 for example in answered)
            yield
            if self.task.threshold is not None and (verdict := _certain(self.task.threshold, self.examples)):
                self.verdict = verdict
                return

    @property
    def norm(self) -> Norm:
        """What choices are compared by: as the first metric that compares them does."""
        return next((metric.norm for metric in self.metrics if metric.norm is not None), "sum")

    def _scored(self, example: Example) -> Example:
        """The example with what it counts in each metric, and for choices the one that was chosen.

        Its output, which metrics of texts compare, depends on no metric; what was chosen does.
        """
        if example.choices:
            output = (example.texts or example.choices)[example.predicted()].strip()
            example = structs.replace(example, chosen=example.predicted(self.norm), output=output)
        return structs.replace(example, scores=scored(example, self.metrics))

    def _answers(self, block: Sequence[EncodedQuestion]) -> Iterator[Example]:
        chosen = [asked for asked in block if isinstance(asked.question, Choices)]
        likelihoods = iter(self.engine.score([request for asked in chosen for request in asked.requests]) if chosen else [])
        for asked in chosen:
            yield self._scored(_chosen(asked, [next(likelihoods) for _ in asked.requests], self.engine.lm))
        if spoken := [asked for asked in block if isinstance(asked.question, Generate)]:
            yield from map(self._scored, self._spoken(spoken))

    def _spoken(self, block: Sequence[EncodedQuestion]) -> Iterator[Example]:
        ways = [asked.question for asked in block if isinstance(asked.question, Generate)]
        prompts = [
            Prompt(asked.requests[0].ids, asked.id, way.max_tokens, way.stop, way.temperature, self.seed)
            for asked, way in zip(block, ways, strict=True)
        ]
        on_text = None if self.task.judge is None else _judging(self.task.judge, prompts)
        for asked, way, answer in zip(block, ways, self.engine.generate(prompts, on_text), strict=True):
            self.generation.add(f"at most {way.max_tokens} tokens, temperature {way.temperature:g}, until {list(way.stop)!r}")
            yield _example(
                asked,
                tuple(text.strip() for text in way.answers),
                output=answer.text.strip(),
                judged=answer.judged,
                read=answer.read,
                saved=len(answer.prompt.ids) + max(0, len(answer.ids) - 1) - answer.read,
            )


def asked_of(
    run: TaskRun, encoder: Encoder, shots: Shots, limit: int | None, data_dir: str | Path | None
) -> Iterator[EncodedQuestion]:
    """The questions as the model reads them, each made when it is needed."""
    asked = 0
    for number, row in enumerate(rows_of(run.task.rows, data_dir)):
        question = question_of(run.task, row, f"row {number}")
        if question is None:
            run.no_question += 1
            continue
        own = id_of(row)
        yield encoder.encode(question, shots.of(row, own), id=own, number=number)
        asked += 1
        if asked == limit:
            return


def in_blocks(questions: Iterator[EncodedQuestion], batch_size: int, *, grow: bool) -> Iterator[list[EncodedQuestion]]:
    """One batch first, so that there are answers at once; then many, so that there are some of each length - but no more than
    one would care to lose where a run is killed, since a block is kept when it is answered."""
    block: list[EncodedQuestion] = []
    size, tokens = batch_size, 0
    for asked in questions:
        block.append(asked)
        tokens += max(len(request.ids) for request in asked.requests)
        if len(block) == size or tokens >= BLOCK:
            yield block
            block, tokens = [], 0
            size = LARGEST * batch_size if grow else size
    if block:
        yield block


def _judging(judge: Judge, prompts: Sequence[Prompt]) -> Callable[[int, str], bool | None]:
    """The judge of the texts so far: what goes wrong with it is said with the row."""

    def judged(number: int, text: str) -> bool | None:
        row = prompts[number].name
        try:
            verdict = judge(text)
        except Exception as error:
            raise TaskError(f"the judge raised {type(error).__name__}: {error}, on row {row}: {text[-200:]!r}.") from error
        if verdict is not None and not isinstance(verdict, bool | np.bool_):
            raise TaskError(f"the judge said {verdict!r} of row {row}: it says True, False, or None while it is not certain.")
        return None if verdict is None else bool(verdict)

    return judged


def _chosen(asked: EncodedQuestion, found: Sequence[Scored], lm: Model) -> Example:
    question = asked.question
    assert isinstance(question, Choices)
    for choice, score in zip(question.choices, found, strict=True):
        if not np.isfinite(score.loglikelihood).all():
            raise NotFiniteError(
                f"{lm.spec} gave a log-likelihood of {score.loglikelihood.tolist()} for the choice {choice!r} of row "
                f"{asked.number} ({asked.id}), in {lm.dtype} on {lm.device}. Such a number cannot be compared, so the run "
                "stops here; what was finished before is kept."
            )
    read = sum(score.read for score in found)
    return _example(
        asked,
        tuple((question.texts or question.choices)[index].strip() for index in question.answers),
        choices=question.choices,
        texts=question.texts,
        right=question.answers,
        loglikelihoods=tuple(float(score.loglikelihood.sum()) for score in found),
        tokens=tuple(len(score.loglikelihood) for score in found),
        greedy=tuple(bool(score.greedy) for score in found),
        read=read,
        saved=asked.alone - read,
    )


def _example(asked: EncodedQuestion, targets: tuple[str, ...], **answer: Any) -> Example:
    return Example(
        id=asked.id,
        number=asked.number,
        prompt=asked.prompt,
        key=asked.key,
        group=asked.question.group,
        targets=targets,
        target=targets[0] if targets else None,
        truncated=asked.truncated,
        retokenized=asked.retokenized,
        **answer,
    )


def _certain(threshold: float, examples: Sequence[Example]) -> str | None:
    """Whether the rate of answers that were judged True is above or below the threshold, if that is certain by now."""
    if groups := [example.group for example in examples if example.group is not None]:
        raise TaskError(
            f"answers of one group ({groups[0]}) depend on one another, and when a rate is certain is only known of "
            "independent ones. Leave `group` out, or `threshold`."
        )
    judged = sum(example.judged is True for example in examples)
    return sequential.verdict(judged, len(examples), threshold)


def record_of(run: TaskRun, settings: dict[str, Any], details: dict[str, Any], *, seconds: float) -> Record:
    """What the answers of a task come to, and how they were had."""
    task, engine = run.task, run.engine
    certificate, sharing = engine.policy.certificate, engine.policy.sharing
    details = {"prefix_sharing": sharing, **details, **_counts(run)}
    return Record(
        kind="task",
        subject=f"{task.name}, {settings['shots']}-shot",
        lm=facts(engine.lm),
        settings=settings,
        details=details,
        notes=_notes(details),
        metrics=_values(run),
        cost=Cost(
            seconds=seconds,
            tokens=sum(example.read for example in run.examples),
            state_bytes=engine.counts.peak_state_bytes,
        ),
        certificate=None if certificate is None else structs.replace(certificate, chunking_used=sharing),
        example="question",
    )


def _expected(task: Task, limit: int | None) -> int | None:
    """How many questions there will be, where that is known."""
    length = len(task.rows) if isinstance(task.rows, list | tuple) else None
    return limit if length is None else length if limit is None else min(limit, length)


def _prompts(examples: list[Example]) -> str:
    """A hash of all that was asked, and of what is right, in any order."""
    asked = sorted(f"{one.id}{one.prompt}{one.choices}{one.texts}{one.right}{one.targets}" for one in examples)
    return hashlib.sha256("".join(asked).encode(errors="surrogatepass")).hexdigest()[:16]


def _counts(run: TaskRun) -> dict[str, Any]:
    """What a reader of the number should know of how it was had."""
    return {
        "questions": len(run.examples),
        "not_questions": run.no_question,
        "truncated": sum(example.truncated > 0 for example in run.examples),
        "retokenized": sum(example.retokenized for example in run.examples),
        "ties": sum(example.tied for example in run.examples),
        "tokens_read": sum(example.read for example in run.examples),
        "tokens_alone": sum(example.read + example.saved for example in run.examples),
        "padding": run.engine.counts.padding,
    }


def _notes(details: dict[str, Any]) -> list[str]:
    """The same in words, where something is not as one would expect."""
    names = ("truncated", "retokenized", "ties", "not_questions", "not_asked")
    said = [f"{details[name]:,} {name.replace('_', ' ')}" for name in names if details.get(name)]
    return [*([] if details["prefix_sharing"] == "prefix sharing: on" else [details["prefix_sharing"]]), *said]


def _values(run: TaskRun) -> dict[str, Value]:
    found = compute(run.metrics, run.examples, seed=run.seed, threshold=run.task.threshold)
    if run.verdict is not None:  # when it ended depended on what was said: only the rate's interval allows for that
        found |= {name: metric(name).value(float(value), n=value.n) for name, value in found.items() if name != "rate"}
    return found


def _named(rows: Any) -> str:
    """What a record calls the rows."""
    if isinstance(rows, list | tuple):
        return f"{len(rows)} rows"
    name = getattr(rows, "__qualname__", None)
    return str(rows) if isinstance(rows, Rows) else f"{rows.__module__}.{name}" if name else type(rows).__name__


def _saved(run: TaskRun, limit: int | None, data_dir: str | Path | None) -> dict[str, Any]:
    """What was certain so early, and how many questions that saved; None where counting them would be a download."""
    rows = run.task.rows
    if isinstance(rows, Rows) and rows.file(data_dir) is not None and limit is None:
        every: int | None = sum(1 for _ in rows.read(data_dir)) - run.no_question
    else:
        every = _expected(run.task, limit)
    return {"rate_is": run.verdict, "not_asked": None if every is None else every - len(run.examples)}
