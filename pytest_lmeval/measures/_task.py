"""A task, asked, and what its answers come to.

    result = measure_task(lm, find("boolq"), shots=0)
    result.accuracy.low > result.chance

Rows and tokens, reading and metrics each have a file of their own beside this one; here is what a record says of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_lmeval.data.rows import Rows
from pytest_lmeval.errors import TaskError
from pytest_lmeval.models.identity import facts
from pytest_lmeval.models.model import Model
from pytest_lmeval.records.record import Record
from pytest_lmeval.records.value import Metric
from pytest_lmeval.scoring import metrics
from pytest_lmeval.scoring.answers import AnswerFile
from pytest_lmeval.scoring.asking import Run, asked_of
from pytest_lmeval.scoring.examples import Example
from pytest_lmeval.scoring.fewshot import Fewshot, Shots
from pytest_lmeval.scoring.requests import Encoder, Truncate
from pytest_lmeval.scoring.sharing import Sharing
from pytest_lmeval.tasks.questions import Task

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


def measure_task(
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
    run = Run(task, Sharing(lm, batch_size, share, carry, multiple, longest), AnswerFile(partial), seed)
    drawn = Shots(task, shots, fewshot, data_dir=data_dir, seed=seed)
    questions = asked_of(run, Encoder(lm, task, truncate, seed), drawn, limit, data_dir)
    for _ in run.blocks(questions, {**AnswerFile(known).read(), **run.file.read()}):
        if progress is not None:
            progress(len(run.examples), float(run.right), _expected(task, limit))
    if not run.examples:
        raise TaskError(f"{task} has no question: {run.no_question} row(s) were read, and none was one.")
    chosen = {
        "shots": shots,
        "fewshot": task.take if task.take == "first" else fewshot,
        "limit": limit,
        "batch_size": batch_size,
        "seed": seed,
        "truncate": truncate,
        "reading": ("each beginning once" if run.sharing.share else "whole prompts") + (f": {why}" if why else ""),
        **({} if run.verdict is None else _saved(run, limit, data_dir)),
    }
    record = replace(
        record_of(run, chosen, seconds=time.perf_counter() - began),
        certificate=None if certificate is None else {**certificate, "chunking_used": chosen["reading"]},
        examples=None if examples is None else str(examples),
    )
    run.file.finish(run.examples, examples)
    return TaskResult(record, tuple(run.examples), run.resumed)


def record_of(run: Run, chosen: dict[str, Any], *, seconds: float) -> Record:
    """What the answers of a task come to, and how they were had; `chosen` are the settings."""
    task = run.task
    return Record(
        kind="task",
        subject=f"{task.name}, {chosen['shots']}-shot" + ("" if task.style in ("lm_eval", "own") else f", {task.style}"),
        lm=facts(run.sharing.lm),
        settings={"style": task.style, "version": task.version, "rows": _named(task.rows), **chosen, **_counts(run)},
        metrics=_metrics(run),
        cost={
            "seconds": seconds,
            "tokens": sum(example.read for example in run.examples),
            "state_bytes": run.sharing.peak_state_bytes,
        },
    )


def _expected(task: Task, limit: int | None) -> int | None:
    """How many questions there will be, where that is known."""
    length = len(task.rows) if isinstance(task.rows, list | tuple) else None
    return limit if length is None else length if limit is None else min(limit, length)


def _counts(run: Run) -> dict[str, Any]:
    """What a reader of the number should know of how it was had."""
    prompts = sorted(f"{example.id}{example.prompt}{example.choices}" for example in run.examples)
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
    }


def _metrics(run: Run) -> dict[str, Metric]:
    found = metrics.compute(run.task.metrics, run.examples, seed=run.seed, threshold=run.task.threshold)
    if run.verdict is not None:  # when it ended depended on what was said: only the rate's interval allows for that
        found |= {name: _bare(metric) for name, metric in found.items() if name != "rate"}
    if several := [example for example in run.examples if len(example.choices) > 1]:
        found |= metrics.compute(("chance",), several)
    return found


def _bare(metric: Metric) -> Metric:
    return Metric(metric, metric.unit, n=metric.n, higher_is_better=metric.higher_is_better)


def _named(rows: Any) -> str:
    """What a record calls the rows."""
    if isinstance(rows, list | tuple):
        return f"{len(rows)} rows"
    name = getattr(rows, "__qualname__", None)
    return str(rows) if isinstance(rows, Rows) else f"{rows.__module__}.{name}" if name else type(rows).__name__


def _saved(run: Run, limit: int | None, data_dir: str | Path | None) -> dict[str, Any]:
    """What was certain so early, and how many questions that saved; None where counting them would be a download."""
    rows = run.task.rows
    if isinstance(rows, Rows) and rows.file(data_dir) is not None and limit is None:
        every: int | None = sum(1 for _ in rows.read(data_dir)) - run.no_question
    else:
        every = _expected(run.task, limit)
    return {"rate_is": run.verdict, "not_asked": None if every is None else every - len(run.examples)}
