"""Train: update on batches of crops, evaluate now and then, and keep the best weights."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn
from torch.nn import functional as F

from pytest_lmeval.engine import Engine, Policy, Request
from pytest_lmeval.errors import ModelError, OutOfMemory, TrainingError
from pytest_lmeval.measures._text_reading import Progress
from pytest_lmeval.models._failures import NoMemory, failure_of, halving, unless_full
from pytest_lmeval.models._flops import Flops, training_flops
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._seeds import generator_of
from pytest_lmeval.models._sources import load
from pytest_lmeval.profiling._clock import seconds
from pytest_lmeval.profiling._peak import peak_memory
from pytest_lmeval.records._journal import Saver
from pytest_lmeval.training._plan import Plan, Source, batches, held_out_batches, plan_for, read, steps_an_epoch
from pytest_lmeval.training._protocol import Protocol, learning_rate
from pytest_lmeval.training._refusals import not_finite, refuse_divergence, refuse_not_finite
from pytest_lmeval.training._result import TrainResult, record_of
from pytest_lmeval.training._run import Folder, Run, new_run
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
    if folder is None:
        return _fit(plan, None, progress)
    files = Folder(Path(folder) / "models" / plan.key)
    if fresh:
        shutil.rmtree(files.path, ignore_errors=True)
    if (finished := files.finished(plan.lm)) is not None:
        trained, record = finished
        name = spec or trained.spec
        record = structs.replace(record, lm=structs.replace(record.lm, spec=name))
        return TrainResult(record, replace(trained, spec=name), cached=True)
    return _fit(plan, files if files.begin({**plan.names, "decided by": plan.identity}) else None, progress)


def _fit(plan: Plan, files: Folder | None, progress: Progress | None) -> TrainResult:
    """Read the texts, train, and record the outcome."""
    lm, protocol = plan.lm, plan.protocol
    tokens = read(lm, plan.text, protocol.tokens)
    per_epoch = steps_an_epoch(tokens, protocol, str(plan.text))
    steps = protocol.steps or per_epoch * (protocol.epochs or 0)
    unseen = plan.held_out
    held_out = [] if unseen is None else held_out_batches(read(lm, unseen, protocol.tokens), protocol, str(unseen))
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        flops = flops_of_a_step(copy_of(lm), next(batches(tokens, protocol)), protocol.seed)
        with peak_memory(lm.device) as peak:
            begin = partial(new_run, plan)
            run = begin() if files is None else files.resume(begin)
            saver = Saver(None if files is None else files.save, "training")
            try:
                rest = (tokens, held_out, protocol, steps, saver, progress)
                while (full := unless_full(partial(_learn, run, *rest))) is not None:
                    # weights may be half updated: go on from the last saved point, or the beginning
                    rows, resumed_at = fewer_rows(run, protocol.batch_size, full.wanted), run.resumed_at
                    del run
                    run = begin() if files is None else files.resume(begin)
                    run.micro_batch, run.resumed_at = rows, resumed_at
            except TrainingError as error:
                if files is None or not run.best:
                    raise
                files.save_best(run)
                best = f"The best weights so far, those after {run.best_step} steps, are in {files.best}."
                raise TrainingError(f"{error} {best}") from None
    if not held_out:
        run.keep_as_best()
    trained = replace(copy_of(lm), spec=run.best_spec)  # without anything that training left in the module
    fill(trained, run.best, "what was trained")
    record = record_of(run, trained, plan, per_epoch, flops, peak)
    if files is not None:
        files.finish(run, record)
    return TrainResult(record, trained, resumed_at=run.resumed_at)


def _learn(
    run: Run,
    tokens: np.ndarray,
    held_out: list[Tensor],
    protocol: Protocol,
    steps: int,
    saver: Saver,
    progress: Progress | None,
) -> None:
    """Train from the state of `run` to the last step."""

    def examine() -> None:
        if held_out:
            nats = evaluate(run.lm, held_out)
            refuse_not_finite(run, nats)
            run.add_evaluation(nats)

    if not run.evaluations:
        examine()
    a_step = protocol.batch_size * protocol.seq_len
    nats = a_step * sum(run.losses)
    run.module.train()
    for crops in islice(batches(tokens, protocol, first=run.step), steps - run.step):
        began = seconds(run.lm.device)
        update(run, crops, protocol, steps)
        run.seconds += seconds(run.lm.device) - began
        if run.step % protocol.eval_every == 0 or run.step == steps:
            examine()
            refuse_divergence(run, protocol, steps)
        saver.save_if_due(run)
        if progress is not None:
            nats += a_step * run.losses[-1]
            progress(a_step * run.step, nats, a_step * steps)


def update(run: Run, crops: Tensor, protocol: Protocol, steps: int) -> None:
    """Take a step of the optimizer, and record loss and gradient norm. Raises TrainingError before it if one is not finite."""
    rate = learning_rate(protocol, run.step, steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    seed = (protocol.seed << 32) + run.step
    before = run.versions
    while isinstance(found := unless_full(partial(gradients, run, crops, seed, protocol.clip)), NoMemory):
        run.optimizer.zero_grad()
        if run.versions != before:
            raise OutOfMemory(f"{run.lm.spec} had changed its buffers when memory ran out.", found.wanted)
        run.micro_batch = fewer_rows(run, len(crops), found.wanted)
    if not all(map(math.isfinite, found)):
        raise not_finite(run, *found, rate, again=partial(accumulate, run, crops, seed))
    run.optimizer.step()
    run.losses.append(found[0])
    run.norms.append(found[1])


def gradients(run: Run, crops: Tensor, seed: int, clip: float | None) -> tuple[float, float]:
    """Leave the clipped gradients of a batch in the parameters; its loss, and the norm of the gradients before clipping."""
    loss = accumulate(run, crops, seed)
    trained = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(trained, clip, norm)
    return loss, norm.item()


def accumulate(run: Run, crops: Tensor, seed: int) -> float:
    """Leave the gradients of the mean loss of crops [b, t + 1] in the parameters, and return that loss.

    They are read `micro_batch` at once, each part weighted by its targets, all with the random numbers that follow `seed`.
    """
    total = 0.0
    for index, part in enumerate(crops.split(run.micro_batch or len(crops))):  # type: ignore[no-untyped-call]
        loss = loss_of(run.lm, part, None if index else seed) * (len(part) / len(crops))
        if not index:
            run.optimizer.zero_grad()  # not before the forward pass: freed memory would be allocated anew in each step
        differentiate(run.lm, loss)
        total += loss.item()
    return total


def fewer_rows(run: Run, batch_size: int, wanted: int | None) -> int:
    """Half of the rows that are read at once. Raises OutOfMemory if that is one."""
    rows = run.micro_batch or batch_size
    if rows > 1:
        return rows // 2
    raise no_room(run.lm, f"{run.text}, step {run.step + 1}", batch_size, wanted)


def no_room(lm: Model, where: str, batch_size: int, wanted: int | None) -> OutOfMemory:
    """The error for a model of which not even one row can be trained."""
    size = "" if wanted is None else f" (an allocation of {wanted:,} bytes failed)"
    tried = " and then ".join(str(batch_size >> halved) for halved in range(batch_size.bit_length()))
    return OutOfMemory(
        f"{lm.spec} on {where}: memory ran out{size} with {tried} rows at once. A training needs room for the weights, their "
        "gradients, two more numbers for each, and what a row leaves for the backward pass. Take a smaller seq_len, or a "
        "device with more memory.",
        wanted,
    )


def loss_of(lm: Model, crops: Tensor, seed: int | None) -> Tensor:
    """Mean loss of crops [b, t + 1], each read from an empty state, in nats per token.

    seed  of dropout; None: the random numbers go on
    """
    if seed is not None:
        generator_of(lm.device).manual_seed(seed)
    crops = crops.to(lm.device)
    logits, _ = lm.step(crops[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())


def evaluate(lm: Model, held_out: list[Tensor]) -> Tensor:
    """Nats of each held-out crop, read from an empty state, [crops] float64 on the CPU."""
    assert lm.module is not None
    was_training = lm.module.training
    lm.module.eval()
    engine = Engine(lm, Policy(carry=False, batch_size=len(held_out[0])))
    try:
        scored = engine.score([Request(crop, 1) for crops in held_out for crop in crops.numpy()])
    finally:
        lm.module.train(was_training)
    return torch.tensor([-one.loglikelihood.sum() for one in scored], dtype=torch.float64)


def flops_of_a_step(lm: Model, crops: Tensor, seed: int) -> Flops:
    """Counts a step of a copy of the model, which it may change (running means, counters); of fewer rows if all do not fit."""
    assert lm.module is not None
    lm.module.train()
    found, rows = halving(
        lambda rows: training_flops(partial(loss_of, lm, crops[:rows], seed), partial(differentiate, lm)), len(crops)
    )
    if isinstance(found, NoMemory):
        raise no_room(lm, "its first batch", len(crops), found.wanted)
    return Flops(found.forward * len(crops) // rows, found.backward * len(crops) // rows)


def differentiate(lm: Model, loss: Tensor) -> None:
    """Add the gradients of the loss to those of the parameters. Raises ModelError if the loss has none."""
    why = "the model runs under torch.no_grad, or detaches what it computed"
    try:
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
            return
    except RuntimeError as error:
        if failure_of(error):
            raise
        why = str(error)
    raise ModelError(f"{lm.spec} can be scored, but not trained, since its loss has no gradient: {why}")
