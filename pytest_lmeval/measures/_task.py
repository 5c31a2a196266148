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
from typing import Any, Literal

from msgspec import structs

from pytest_lmeval.data._rows import Rows
from pytest_lmeval.errors import ArgumentError, TaskError, nearest
from pytest_lmeval.laws._permits import how_to_share
from pytest_lmeval.measures._context import VerbContext, current, verb
from pytest_lmeval.models._identity import facts, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import key_of
from pytest_lmeval.records._measured import Cost, Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._answers import AnswerFile
from pytest_lmeval.scoring._asking import Run, asked_of
from pytest_lmeval.scoring._fewshot import Fewshot, Shots
from pytest_lmeval.scoring._metrics import compute, metrics_of
from pytest_lmeval.scoring._requests import Encoder, Truncate
from pytest_lmeval.scoring._sharing import Sharing
from pytest_lmeval.tasks import find
from pytest_lmeval.tasks._questions import Task

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
        "batch_size": batch_size,
        "fewshot": fewshot,
        "truncate": truncate,
        "seed": seed,
    }
    rows = [asked.name, asked.style, _identity_of(context, asked.rows), tokenizer_fingerprint(model)]
    key = context.key("task", model, settings, rows)
    written = context.file("examples.jsonl")
    finished = context.journaled(key)  # of an interrupted run: its answers, if the questions are the same
    with context.session.progress(f"{model.spec} answers {asked.name}", unit="questions") as progress:
        result = measure_task(
            model,
            asked,
            **{**settings, **how_to_share(model, certificate, batch_size)},
            data_dir=context.session.mirror,
            examples=context.path(written),
            partial=context.path(f"partial/{key}.jsonl"),
            known=context.path(finished.examples if finished else None),
            certificate=certificate,
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
class TaskResult:
    """What a task came to. Every metric of the task is an attribute; numbers carry `.low` and `.high`, their 95 % interval.

    resumed  questions that an interrupted run had already asked
    """

    record: Record
    examples: tuple[Example, ...] = ()
    resumed: int = 0

    def __repr__(self) -> str:
        return repr(self.record)

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
    certificate: Certificate | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Ask a model a task.

    shots     examples shown before each question, drawn as `fewshot` says (see `scoring._fewshot`)
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
    metrics = metrics_of([*task.metrics, *({"chance"} - set(task.metrics))], task.name)
    began = time.perf_counter()
    run = Run(task, metrics, Sharing(lm, batch_size, share, carry, multiple, longest), AnswerFile(partial), seed)
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
        "batch_size": batch_size,
        "seed": seed,
        "truncate": truncate,
        **({} if task.threshold is None else {"threshold": task.threshold}),
        "prompts": _prompts(run.examples),
        **({"generation": sorted(run.generation)} if run.generation else {}),
    }
    sharing = f"prefix sharing: {'on' if run.sharing.share else 'off'}" + (f" ({why})" if why else "")
    saved = {} if run.verdict is None else _saved(run, limit, data_dir)
    record = structs.replace(
        record_of(run, settings, {"prefix_sharing": sharing, **saved}, seconds=time.perf_counter() - began),
        certificate=None if certificate is None else structs.replace(certificate, chunking_used=sharing),
        examples=None if examples is None else str(examples),
    )
    run.file.finish(run.examples, examples)
    return TaskResult(record, tuple(run.examples), run.resumed)


def record_of(run: Run, settings: dict[str, Any], details: dict[str, Any], *, seconds: float) -> Record:
    """What the answers of a task come to, and how they were had."""
    task, details = run.task, {**details, **_counts(run)}
    return Record(
        kind="task",
        subject=f"{task.name}, {settings['shots']}-shot",
        lm=facts(run.sharing.lm),
        settings=settings,
        details=details,
        notes=_notes(details),
        metrics=_values(run),
        cost=Cost(
            seconds=seconds,
            tokens=sum(example.read for example in run.examples),
            state_bytes=run.sharing.peak_state_bytes,
        ),
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


def _counts(run: Run) -> dict[str, Any]:
    """What a reader of the number should know of how it was had."""
    return {
        "questions": len(run.examples),
        "not_questions": run.no_question,
        "truncated": sum(example.truncated > 0 for example in run.examples),
        "retokenized": sum(example.retokenized for example in run.examples),
        "ties": sum(example.tied for example in run.examples),
        "tokens_read": sum(example.read for example in run.examples),
        "tokens_alone": sum(example.read + example.saved for example in run.examples),
        "padding": run.sharing.filling,
    }


def _notes(details: dict[str, Any]) -> list[str]:
    """The same in words, where something is not as one would expect."""
    names = ("truncated", "retokenized", "ties", "not_questions", "not_asked")
    said = [f"{details[name]:,} {name.replace('_', ' ')}" for name in names if details.get(name)]
    return [*([] if details["prefix_sharing"] == "prefix sharing: on" else [details["prefix_sharing"]]), *said]


def _values(run: Run) -> dict[str, Value]:
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


def _saved(run: Run, limit: int | None, data_dir: str | Path | None) -> dict[str, Any]:
    """What was certain so early, and how many questions that saved; None where counting them would be a download."""
    rows = run.task.rows
    if isinstance(rows, Rows) and rows.file(data_dir) is not None and limit is None:
        every: int | None = sum(1 for _ in rows.read(data_dir)) - run.no_question
    else:
        every = _expected(run.task, limit)
    return {"rate_is": run.verdict, "not_asked": None if every is None else every - len(run.examples)}
