"""Train: update on batches, evaluate now and then, and keep the best weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from msgspec import structs

from pytest_lmeval.errors import TrainingError
from pytest_lmeval.measures._text_reading import Progress
from pytest_lmeval.models._failures import unless_full
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._sources import load
from pytest_lmeval.profiling._clock import seconds
from pytest_lmeval.profiling._peak import peak_memory
from pytest_lmeval.records._journal import Saver
from pytest_lmeval.training._objective import Objective
from pytest_lmeval.training._plan import Plan, Source, plan_for
from pytest_lmeval.training._protocol import Protocol
from pytest_lmeval.training._refusals import refuse_not_finite
from pytest_lmeval.training._result import TrainResult
from pytest_lmeval.training._run import Folder, Run, new_run
from pytest_lmeval.training._text_objective import text_objective
from pytest_lmeval.training._updates import fewer_rows, update
from pytest_lmeval.training._weights import copy_of, fill

DEFAULT = Protocol()


def run_training(
    lm: Model | str,
    corpus: Source,
    *,
    held_out: Source | None = None,
    protocol: Protocol = DEFAULT,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    spec: str | None = None,
    fresh: bool = False,
) -> TrainResult:
    """Train a copy of `lm` on a corpus; `lm` itself does not change.

    Every model gets the same tokens in the same order, each crop from an empty state. An interrupted training resumes from its
    last saved point, with the same result (bit for bit on the CPU); the result of a finished one is returned at once.

    corpus, held_out   each a `Corpus`, the name of one, or token ids (tensor, array, list, iterator of arrays); the result has
                       the weights with the lowest loss on `held_out`
    folder             keep weights, record and resume point in folder/models/KEY; None: write nothing
    progress           called after each step with tokens so far, nats so far, tokens expected
    spec               name of the trained model; by default "SPEC, trained N steps on CORPUS"
    fresh              train anew, even if the training is finished

    Raises SpecError for a model that cannot be trained, CorpusError for a text that is too short or equal to the held-out one,
    StreamError for a token outside the vocabulary, TrainingError for a loss that is not finite or diverges.
    """
    plan = plan_for(load(lm) if isinstance(lm, str) else lm, corpus, held_out, protocol, spec)
    return follow(plan, partial(text_objective, plan), folder, progress, fresh=fresh)


def follow(
    plan: Plan,
    prepare: Callable[[], Objective],
    folder: str | Path | None,
    progress: Progress | None = None,
    *,
    fresh: bool = False,
) -> TrainResult:
    """Follow a plan, go on where it was interrupted, or take its result from the folder; `prepare` reads what is learned."""
    if folder is None:
        return _fit(plan, prepare(), None, progress)
    files = Folder(Path(folder) / "models" / plan.key)
    if fresh:
        shutil.rmtree(files.path, ignore_errors=True)
    if (finished := files.finished(plan.lm, partial=plan.partial)) is not None:
        trained, record = finished
        name = plan.spec or trained.spec
        record = structs.replace(record, lm=structs.replace(record.lm, spec=name))
        return TrainResult(record, replace(trained, spec=name), cached=True)
    written = files.begin({**plan.names, "decided by": plan.identity})
    return _fit(plan, prepare(), files if written else None, progress)


def _fit(plan: Plan, objective: Objective, files: Folder | None, progress: Progress | None) -> TrainResult:
    """Train, and record the outcome."""
    lm = plan.lm
    with (
        torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []),
        peak_memory(lm.device) as peak,
    ):
        begin = partial(new_run, plan)
        run = begin() if files is None else files.resume(begin)
        saver = Saver(None if files is None else files.save, "training")
        try:
            while (full := unless_full(partial(_learn, run, objective, plan.protocol, saver, progress))) is not None:
                # weights may be half updated: go on from the last saved point, or the beginning
                rows, resumed_at = fewer_rows(run, objective.batch_size, full.wanted), run.resumed_at
                del run
                run = begin() if files is None else files.resume(begin)
                run.micro_batch, run.resumed_at = rows, resumed_at
        except TrainingError as error:
            if files is None or not run.best:
                raise
            files.save_best(run)
            best = f"The best weights so far, those after {run.best_step} steps, are in {files.best}."
            raise TrainingError(f"{error} {best}") from None
    if not objective.holds_out:
        run.keep_as_best()
    trained = replace(copy_of(lm, partial=plan.partial), spec=run.best_spec)  # without what training left in the module
    fill(trained, run.best, "what was trained", partial=plan.partial)
    record = objective.record(run, trained, peak)
    if files is not None:
        files.finish(run, record)
    return TrainResult(record, trained, resumed_at=run.resumed_at)


def _learn(run: Run, objective: Objective, protocol: Protocol, saver: Saver, progress: Progress | None) -> None:
    """Train from the state of `run` to the last step."""

    def examine() -> None:
        if objective.holds_out:
            nats = objective.evaluate(run.lm, run.micro_batch or objective.batch_size)
            refuse_not_finite(run, nats, objective.item)
            run.add_evaluation(nats)

    if not run.evaluations:
        examine()
    a_step, steps = objective.batch_size * objective.unit, objective.steps
    nats = a_step * sum(run.losses)
    run.module.train()
    for batch in islice(objective.batches(run.step), steps - run.step):
        began = seconds(run.lm.device)
        update(run, objective, batch, protocol)
        run.seconds += seconds(run.lm.device) - began
        if run.step % protocol.eval_every == 0 or run.step == steps:
            examine()
            objective.refuse(run)
        saver.save_if_due(run)
        if progress is not None:
            nats += a_step * run.losses[-1]
            progress(a_step * run.step, nats, a_step * steps)
