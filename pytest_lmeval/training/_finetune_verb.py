"""The verb `finetune`: fine-tune a model on a task by the one protocol for all models, and ask it the task."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from msgspec import structs

from pytest_lmeval import registry
from pytest_lmeval.engine._policy import refuse_training
from pytest_lmeval.errors import ArgumentError, TaskError
from pytest_lmeval.measures._context import current, verb
from pytest_lmeval.measures._task import BATCH, answers_file, rows_fingerprint
from pytest_lmeval.models._identity import tokenizer_fingerprint
from pytest_lmeval.tasks import find
from pytest_lmeval.tasks._suite import Suite
from pytest_lmeval.tasks._task import Task
from pytest_lmeval.training._finetune_result import FinetuneResult
from pytest_lmeval.training._finetuning import Finetuning, measure_finetune


@functools.partial(verb, trains=True)
def finetune(
    lm: Any,
    task: Task | str,
    seeds: int | Sequence[int] = 5,
    *,
    train: Any = None,
    limit: int | None = None,
    train_limit: int | None = None,
    classes: Literal["head", "verbaliser"] | None = None,
    method: Literal["full", "lora"] = "full",
    rank: int = 8,
    held_out: float = 0.1,
    **protocol: Any,
) -> FinetuneResult:
    """Fine-tune copies of a model on a task, one for each seed, and ask each the task once: median and range over seeds.

    Every model gets the same questions in the same order. A share of the training rows, the same for all, chooses the weights;
    the rows of the task are asked once, with these. What was trained before by the same protocol is taken from the output
    folder, and an interrupted fine-tuning goes on to the same result.

    lm           a spec, or a model, which does not change
    task         a Task, or the name of one; of a suite that is learned as one, such as "mmlu"
    seeds        a number of seeds, from 0 on, or the seeds
    train        rows to learn from: `Rows`, a list, a function; by default those of the task (`Task.train`, else its `shots`)
    limit        ask the first `limit` questions only; by default as --lmeval-limit says
    train_limit  learn from the first so many questions
    classes      where all questions have the same choices: "head", a new linear layer over the hidden state of the last token
                 (the default), or "verbaliser", the log-likelihoods of the choices. Other choices are always compared by
                 likelihood, and of answers in words the loss is that of the answer alone
    method       "full", all weights, or "lora": adapters of this `rank` in all linear layers (needs peft)
    held_out     share of the training rows that chooses the weights
    protocol     fields of `training.Protocol`: steps or epochs (3), batch_size, lr (1e-4), seq_len (512), ...

    Raises TaskError, with the row, for a label that is missing or unknown, before anything is trained.
    """
    context = current()
    session = context.session
    asked = _task(task)
    if isinstance(seeds, bool) or not (isinstance(seeds, int) or (isinstance(seeds, Sequence) and not isinstance(seeds, str))):
        raise ArgumentError(f"seeds={seeds!r}; it is a number of seeds, seeds=5, or the seeds, seeds=(0, 1, 2).")
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    how = Finetuning(protocol, chosen, classes, method, rank, held_out, train_limit)
    model, certificate = context.certified(lm)
    refuse_training(model, certificate)
    limit = session.limit if limit is None else limit
    batch = session.batch if isinstance(session.batch, int) else BATCH
    data = [asked.name, rows_fingerprint(asked, context), tokenizer_fingerprint(model)]
    key = context.key("finetune", model, {**asdict(how), "limit": limit}, data)
    written = context.file("examples.jsonl")
    result = measure_finetune(
        model,
        asked,
        how,
        train=train,
        limit=limit,
        batch_size=batch,
        certificate=certificate,
        data_dir=session.mirror,
        folder=session.folder,
        kept=lambda trained: answers_file(context, trained, asked),
        examples=context.path(written),
        bars=lambda title, unit: session.progress(title, unit=unit),
        fresh=session.fresh and session.writes,
    )
    again = [one.seed for one in result.seeds if one.cached]
    resumed = {one.seed: one.resumed_at for one in result.seeds if one.resumed_at}
    if again:
        context.log.notes.append(f"{model.spec} on {asked}: fine-tuned before with the seeds {', '.join(map(str, again))}")
    for seed, step in resumed.items():
        context.log.notes.append(f"{model.spec} on {asked}: seed {seed} resumed at step {step:,} of an interrupted run")
    context.log.notes += result.record.details.get("warnings", [])
    return context.recorded(key, replace(result, record=structs.replace(result.record, examples=written)))


def _task(task: Any) -> Task:
    """The task of that name; of a suite, the one task as which it is learned."""
    found = task
    if isinstance(task, str):
        named = (registry.resolve("tasks", task) or (None, None))[0]
        found = named if isinstance(named, Suite) else find(task)
    if isinstance(found, Suite):
        if found.finetuned is None:
            raise TaskError(
                f"{found} is a suite of {len(found.tasks)} tasks, and a model is fine-tuned on one: "
                f"{', '.join(map(str, found.tasks))}."
            )
        return found.finetuned
    if not isinstance(found, Task):
        raise ArgumentError(f"a task is a Task, or the name of one; got {task!r}.")
    return found
