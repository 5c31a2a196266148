"""A task, asked: rows as they come, questions in blocks, every answer kept, and what they come to.

    result = evaluate(lm, find("boolq"), shots=0)
    result.accuracy.low > result.chance

The first block is one batch, so that the first answers are there at once; later ones are larger, since more of them share more.
No answer depends on the block that its question stood in, nor on the order or the number of questions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pytest_lmeval.data.rows import Rows
from pytest_lmeval.identity import facts
from pytest_lmeval.lm import Model
from pytest_lmeval.results.metric import Metric
from pytest_lmeval.results.record import Record
from pytest_lmeval.scoring import metrics
from pytest_lmeval.scoring.answers import AnswerFile
from pytest_lmeval.scoring.examples import Example
from pytest_lmeval.scoring.fewshot import Fewshot, Shots, question_of, rows_of
from pytest_lmeval.scoring.generation import generate
from pytest_lmeval.scoring.requests import Asked, Encoder, Truncate
from pytest_lmeval.scoring.sharing import Scored, Sharing
from pytest_lmeval.statistics import sequential
from pytest_lmeval.stream import NotFiniteError
from pytest_lmeval.task import Choices, Generate, Task, TaskError, id_of

LARGEST = 16  # batches in a block after the first
BLOCK = 1 << 16  # tokens of the prompts in a block

Progress = Callable[[int, float, "int | None"], None]
"""Called after each block with the questions answered, those answered right, and the questions expected (None: unknown)."""


@dataclass(frozen=True, repr=False)
class TaskResult:
    """What a task came to. Every metric of the task is an attribute; numbers carry `.low` and `.high`, their 95 % interval.

    resumed  questions that an interrupted run had already asked
    """

    record: Record
    examples: tuple[Example, ...] = ()
    resumed: int = 0

    def __repr__(self) -> str:
        return repr(self.record)

    def __getattr__(self, name: str) -> Metric:
        if name.startswith("_") or name not in self.record.metrics:
            raise AttributeError(f"{self.record.subject} has no metric {name!r}; it has {', '.join(self.record.metrics)}.")
        return self.record.metrics[name]


@dataclass
class Run:
    """What is counted on the way."""

    sharing: Sharing
    file: AnswerFile
    examples: list[Example] = field(default_factory=list)
    resumed: int = 0
    right: int = 0
    generation: set[str] = field(default_factory=set)
    no_question: int = 0
    verdict: str | None = None


def evaluate(
    lm: Model,
    task: Task,
    *,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    fewshot: Fewshot = "document",
    truncate: Truncate = "left",
    share: bool = True,
    carry: bool = True,
    multiple: int = 1,
    longest: int | None = None,
    why: str = "",
    seed: int = 0,
    data_dir: str | Path | None = None,
    examples: str | Path | None = None,
    partial: str | Path | None = None,
    known: str | Path | None = None,
    certificate: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Ask a model a task.

    shots     examples shown before each question, drawn as `fewshot` says (see `scoring.fewshot`)
    limit     ask so many questions, the first ones
    truncate  "left" takes away what does not fit the model's context, and counts it; "refuse" is an error
    share     read what questions have in common once, from a forked state; False where the model is not exact then
    carry     generate token by token with the state carried; False reads everything anew for each token
    multiple  of tokens at which its state can be gone on from; `longest` step that it takes; `why` it is so, for the record
    examples  write each answer to this file of JSON lines
    partial   keep answers here until all are there
    known     take answers from this file, too, where model and question are the very same; and from `partial`

    Raises TaskError for a row that cannot be asked, CorpusError for one that cannot be read, NotFiniteError for a likelihood
    that is no number; all name the row, and keep what was answered before.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise TaskError(f"batch_size is {batch_size} and limit {limit}: a batch, and a task, has at least one question.")
    metrics.check(task.metrics, task.name)
    began = time.perf_counter()
    run = Run(Sharing(lm, batch_size, share, carry, multiple, longest), AnswerFile(partial))
    encoder = Encoder(lm, task, truncate, seed)
    questions = _asked(encoder, Shots(task, shots, fewshot, data_dir=data_dir, seed=seed), limit, run, data_dir)
    found, expected = {**AnswerFile(known).read(), **run.file.read()}, _expected(task, limit)
    for block in _blocks(questions, batch_size, grow=task.threshold is None):
        fresh = [asked for asked in block if (known_ := found.get(asked.number)) is None or known_.asked != asked.asked]
        run.resumed += len(block) - len(fresh)
        found |= {example.number: example for example in _answers(run, task, fresh, seed)}
        run.file.append([found[asked.number] for asked in fresh])
        answered = [found[asked.number] for asked in block]
        if not run.examples:
            metrics.check_examples(task.metrics, answered)  # now, not after the last question
        run.examples += answered
        run.right += sum(_is_right(example) for example in answered)
        if progress is not None:
            progress(len(run.examples), float(run.right), expected)
        if task.threshold is not None and (verdict := _certain(task.threshold, run.examples)):
            run.verdict = verdict
            break
    if not run.examples:
        raise TaskError(f"{task} has no question: {run.no_question} row(s) were read, and none was one.")
    settings = {
        "style": task.style,
        "version": task.version,
        "rows": _named(task.rows),
        "shots": shots,
        "fewshot": task.take if task.take == "first" else fewshot,
        "limit": limit,
        "batch_size": batch_size,
        "seed": seed,
        "truncate": truncate,
        "reading": ("each beginning once" if run.sharing.share else "whole prompts") + (f": {why}" if why else ""),
        **_counts(run, None if run.verdict is None else _all(task, limit, data_dir)),
    }
    record = Record(
        kind="task",
        subject=f"{task.name}, {shots}-shot" + ("" if task.style in ("lm_eval", "own") else f", {task.style}"),
        lm=facts(lm),
        settings=settings,
        metrics=_metrics(task, run, seed),
        cost={
            "seconds": time.perf_counter() - began,
            "tokens": sum(example.read for example in run.examples),
            "state_bytes": run.sharing.peak_state_bytes,
        },
        certificate=None if certificate is None else {**certificate, "chunking_used": settings["reading"]},
        examples=None if examples is None else str(examples),
    )
    run.file.finish(run.examples, examples)
    return TaskResult(record, tuple(run.examples), run.resumed)


def _asked(encoder: Encoder, shots: Shots, limit: int | None, run: Run, data_dir: str | Path | None) -> Iterator[Asked]:
    """The questions as the model reads them, each made when it is needed."""
    asked = 0
    for number, row in enumerate(rows_of(encoder.task.rows, data_dir)):
        question = question_of(encoder.task, row, f"row {number}")
        if question is None:
            run.no_question += 1
            continue
        own = id_of(row)
        yield encoder.encode(question, shots.of(row, own), id=own, number=number)
        asked += 1
        if asked == limit:
            return


def _blocks(questions: Iterator[Asked], batch_size: int, *, grow: bool) -> Iterator[list[Asked]]:
    """One batch first, so that there are answers at once; then many, so that there are some of each length - but no more than
    one would care to lose where a run is killed, since a block is kept when it is answered."""
    block: list[Asked] = []
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


def _answers(run: Run, task: Task, block: Sequence[Asked], seed: int) -> list[Example]:
    chosen = [asked for asked in block if isinstance(asked.question, Choices)]
    spoken = [asked for asked in block if isinstance(asked.question, Generate)]
    scored = run.sharing.score([request for asked in chosen for request in asked.requests]) if chosen else []
    found, at = [], 0
    for asked in chosen:
        found.append(_chosen(asked, scored[at : at + len(asked.requests)], run.sharing.lm))
        at += len(asked.requests)
    if spoken:
        prompts, questions = zip(*((asked.requests[0], asked.question) for asked in spoken), strict=True)
        names = [asked.id for asked in spoken]
        answers = generate(run.sharing, prompts, questions, names, judge=task.judge, seed=seed)
        for asked, answer in zip(spoken, answers, strict=True):
            way = answer.question
            run.generation.add(f"at most {way.max_tokens} tokens, temperature {way.temperature:g}, until {list(way.stop)!r}")
            alone = len(asked.requests[0].ids) + max(0, len(answer.ids) - 1)
            targets = tuple(text.strip() for text in answer.question.answers)
            said = {"output": answer.text, "targets": targets, "judged": answer.judged}
            found.append(_example(asked, read=answer.read, saved=alone - answer.read, **said))
    return found


def _chosen(asked: Asked, scored: Sequence[Scored], lm: Model) -> Example:
    question = asked.question
    assert isinstance(question, Choices)
    for choice, score in zip(question.choices, scored, strict=True):
        if not np.isfinite(score.loglikelihood).all():
            raise NotFiniteError(
                f"{lm.spec} gave a log-likelihood of {score.loglikelihood.tolist()} for the choice {choice!r} of row "
                f"{asked.number} ({asked.id}), in {lm.dtype} on {lm.device}. Such a number cannot be compared, so the run "
                "stops here; what was finished before is kept."
            )
    read = sum(score.read for score in scored)
    return _example(
        asked,
        choices=question.choices,
        texts=question.texts,
        right=question.answers,
        loglikelihoods=tuple(float(score.loglikelihood.sum()) for score in scored),
        tokens=tuple(len(score.loglikelihood) for score in scored),
        greedy=tuple(bool(score.greedy) for score in scored),
        targets=tuple((question.texts or question.choices)[place].strip() for place in question.answers),
        read=read,
        saved=asked.alone - read,
    )


def _example(asked: Asked, **said: Any) -> Example:
    group = asked.question.group
    return Example(asked.id, asked.number, asked.prompt, asked.asked, group, **said, cut=asked.cut, moved=asked.moved)


def _is_right(example: Example) -> bool:
    if example.judged is not None:
        return example.judged
    return example.predicted() in example.right if example.choices else example.answer in example.targets


def _certain(threshold: float, examples: Sequence[Example]) -> str | None:
    """Whether the rate of answers that were judged True is above or below the threshold, if that is certain by now."""
    if groups := [example.group for example in examples if example.group is not None]:
        raise TaskError(
            f"answers of one group ({groups[0]}) depend on one another, and when a rate is certain is only known of "
            "independent ones. Leave `group` out, or `threshold`."
        )
    judged = sum(example.judged is True for example in examples)
    return sequential.verdict(judged, len(examples), threshold)


def _expected(task: Task, limit: int | None) -> int | None:
    """How many questions there will be, where that is known."""
    length = len(task.rows) if isinstance(task.rows, list | tuple) else None
    return limit if length is None else length if limit is None else min(limit, length)


def _counts(run: Run, expected: int | None) -> dict[str, Any]:
    """What a reader of the number should know of how it was had."""
    prompts = sorted(f"{example.id}{example.prompt}{example.choices}" for example in run.examples)
    stopped = run.verdict is not None
    return {
        "prompts": hashlib.sha256("".join(prompts).encode()).hexdigest()[:16],
        "questions": len(run.examples),
        **({"generation": sorted(run.generation)} if run.generation else {}),
        "not_questions": run.no_question,
        "truncated": sum(example.cut > 0 for example in run.examples),
        "moved_borders": sum(example.moved for example in run.examples),
        "ties": sum(example.tied for example in run.examples),
        "tokens_read": sum(example.read for example in run.examples),
        "tokens_alone": sum(example.read + example.saved for example in run.examples),
        "filling": run.sharing.filling,
        **({"rate_is": run.verdict, "not_asked": expected - len(run.examples) if expected else None} if stopped else {}),
    }


def _metrics(task: Task, run: Run, seed: int) -> dict[str, Metric]:
    found = metrics.compute(task.metrics, run.examples, seed=seed, threshold=task.threshold)
    if run.verdict is not None:  # when it ended depended on what was said: only the rate's interval allows for that
        found |= {name: _bare(metric) for name, metric in found.items() if name != "rate"}
    if several := [example for example in run.examples if len(example.choices) > 1]:
        found |= metrics.compute(("chance",), several, seed=seed)
    return found


def _bare(metric: Metric) -> Metric:
    return Metric(metric, metric.unit, n=metric.n, higher_is_better=metric.higher_is_better)


def _named(rows: Any) -> str:
    """What a record calls the rows."""
    if isinstance(rows, list | tuple):
        return f"{len(rows)} rows"
    return f"{rows.__module__}.{rows.__qualname__}" if callable(rows) else str(rows)


def _all(task: Task, limit: int | None, data_dir: str | Path | None) -> int | None:
    """How many rows there would have been; None where counting them would be a download."""
    if isinstance(task.rows, Rows) and task.rows.file(data_dir) is not None and limit is None:
        return sum(1 for _ in task.rows.read(data_dir))
    return _expected(task, limit)
