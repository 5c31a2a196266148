"""Training: crops of a text, a step for each batch of them, an evaluation now and then, and the best weights kept.

The loop is `learn`. What is trained is decided before (`_plan.py`), how it stands is in `_run.py`, its files in `_folder.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn
from torch.nn import functional as F

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.engine import Engine, Policy, Request
from pytest_lmeval.errors import TrainingError
from pytest_lmeval.measures._perplexity import Progress
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._seeds import generator_of
from pytest_lmeval.models._sources import load
from pytest_lmeval.profiling._clock import seconds
from pytest_lmeval.profiling._flops import Flops, training_flops
from pytest_lmeval.profiling._peak import peak_memory
from pytest_lmeval.records._journal import Saver
from pytest_lmeval.training._batches import batches, held_out_batches, read, steps_an_epoch
from pytest_lmeval.training._failure import differentiate, not_finite, refuse_divergence, refuse_not_finite
from pytest_lmeval.training._folder import Folder
from pytest_lmeval.training._plan import Plan, plan_for
from pytest_lmeval.training._protocol import Protocol, learning_rate
from pytest_lmeval.training._result import TrainResult, record_of
from pytest_lmeval.training._run import Run, new_run
from pytest_lmeval.training._trainee import copy_of
from pytest_lmeval.training._weights import fill

DEFAULT = Protocol()


def run_training(
    lm: Model | str,
    corpus: Corpus | Iterable[Any],
    *,
    held_out: Corpus | Iterable[Any] | None = None,
    protocol: Protocol = DEFAULT,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    spec: str | None = None,
    fresh: bool = False,
) -> TrainResult:
    """Train a copy of `lm` on a corpus; `lm` itself is not changed.

    Every model gets the same tokens in the same order, whether it carries a state or not: each crop is read from an empty one.
    A training that was interrupted goes on from its last saved point, with the same result (on the CPU bit for bit). One that
    was finished is not done again: the same model, texts and protocol give the same record and weights at once.

    corpus, held_out   each a `Corpus`, or token ids (tensor, array, list, iterator of arrays); the model is evaluated on
                       `held_out` during training, and the result has the weights with the lowest held-out loss
    folder             keep weights, record and points to go on from in folder/models/KEY; without, nothing is written
    progress           called after each step with the tokens so far, the nats so far, and the tokens expected
    spec               how the trained model is called; by default "SPEC, trained N steps on CORPUS"
    fresh              train anew, even if it was done before

    Raises SpecError for a model that cannot be trained like this, CorpusError for a text that is too short or held out from
    itself, StreamError for a token outside the vocabulary, TrainingError for a loss that is not finite or that diverges.
    """
    plan = plan_for(load(lm) if isinstance(lm, str) else lm, corpus, held_out, protocol, spec)
    if folder is None:
        return fit(plan, None, progress)
    files = Folder(Path(folder) / "models" / plan.key)
    if fresh:
        files.clear()
    if (finished := files.finished(plan.lm)) is not None:
        trained, record = finished
        called = spec or trained.spec
        record = structs.replace(record, lm=structs.replace(record.lm, spec=called))
        return TrainResult(replace(trained, spec=called), record, cached=True)
    files.begin({**plan.names, "decided by": plan.identity})
    return fit(plan, files, progress)


@dataclass(frozen=True)
class Material:
    """What is read: the tokens to train on [n], the crops of each evaluation, the steps, and how many of them make an epoch."""

    tokens: np.ndarray
    held_out: list[Tensor]
    steps: int
    per_epoch: int


def material_of(plan: Plan) -> Material:
    protocol = plan.protocol
    tokens = read(plan.lm, plan.text, protocol.tokens)
    per_epoch = steps_an_epoch(tokens, protocol, str(plan.text))
    steps = protocol.steps or per_epoch * (protocol.epochs or 0)
    unseen = plan.held_out
    crops = [] if unseen is None else held_out_batches(read(plan.lm, unseen, protocol.tokens), protocol, str(unseen))
    return Material(tokens, crops, steps, per_epoch)


def fit(plan: Plan, files: Folder | None, progress: Progress | None) -> TrainResult:
    """Read the texts, train, and write down what came of it."""
    lm, material = plan.lm, material_of(plan)
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        flops = flops_of_a_step(plan, material)
        with peak_memory(lm.device) as peak:
            begin = partial(new_run, plan)
            run = begin() if files is None else files.resume(begin)
            try:
                learn(run, material, plan.protocol, Saver(None if files is None else files.save, "training"), progress)
            except TrainingError as error:
                raise TrainingError(f"{error}{keep(run, files)}") from None
    if not material.held_out:
        run.keep_as_best()
    trained = replace(copy_of(lm), spec=run.best_spec)  # nothing that training left in the module comes with it
    fill(trained, run.best, "what was trained")
    record = record_of(run, trained, plan, material.per_epoch, flops, peak)
    if files is not None:
        files.save_best(run)
        files.finish(record)
    return TrainResult(trained, record, resumed_at=run.resumed_at)


def learn(run: Run, material: Material, protocol: Protocol, saver: Saver, progress: Progress | None) -> None:
    """Go on from where `run` stands, to the last step."""
    if not run.evaluations:
        examine(run, material)
    a_step = protocol.batch_size * protocol.seq_len
    expected, nats = a_step * material.steps, a_step * sum(run.losses)
    run.module.train()
    for crops in islice(batches(material.tokens, protocol, first=run.step), material.steps - run.step):
        began = seconds(run.lm.device)
        loss, norm = update(run, crops, protocol, material.steps)
        run.add_step(loss, norm, seconds(run.lm.device) - began)
        if run.step % protocol.eval_every == 0 or run.step == material.steps:
            examine(run, material)
            refuse_divergence(run, protocol, material.steps)
        saver.save_now_and_then(run)
        if progress is not None:
            nats += a_step * loss
            progress(a_step * run.step, nats, expected)


def examine(run: Run, material: Material) -> None:
    """Evaluate on the held-out text, if there is one."""
    if material.held_out:
        nats = evaluate(run.lm, material.held_out)
        refuse_not_finite(run, nats)
        run.add_evaluation(nats)


def update(run: Run, crops: Tensor, protocol: Protocol, steps: int) -> tuple[float, float]:
    """One step of the optimizer: the mean loss (nats a token) before it, and the norm of all gradients.

    Raises TrainingError, the weights being as before, where either is not finite.
    """
    rate = learning_rate(protocol, run.step, steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    seed = (protocol.seed << 32) + run.step
    loss = loss_of(run.lm, crops, seed)
    run.optimizer.zero_grad()  # not before: gradients that go with each step are memory to be had anew with each step
    differentiate(run.lm, loss)
    trained = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    figures = loss.item(), norm.item()
    if not all(map(math.isfinite, figures)):
        raise not_finite(run, *figures, rate, again=partial(loss_of, run.lm, crops, seed))
    if protocol.clip is not None:
        nn.utils.clip_grads_with_norm_(trained, protocol.clip, norm)
    run.optimizer.step()
    return figures


def loss_of(lm: Model, crops: Tensor, seed: int) -> Tensor:
    """Mean loss of crops [b, t + 1], each read from an empty state, in nats a token; `seed` is that of dropout."""
    generator_of(lm.device).manual_seed(seed)
    crops = crops.to(lm.device)
    logits, _ = lm.step(crops[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())


def evaluate(lm: Model, held_out: list[Tensor]) -> Tensor:
    """Nats of each held-out crop, each read from an empty state, [crops] float64 on the CPU."""
    assert lm.module is not None
    was_training = lm.module.training
    lm.module.eval()
    engine = Engine(lm, Policy(carry=False, batch_size=len(held_out[0])))
    try:
        scored = engine.score([Request(crop, 1) for crops in held_out for crop in crops.numpy()])
    finally:
        lm.module.train(was_training)
    return torch.tensor([-one.loglikelihood.sum() for one in scored], dtype=torch.float64)


def flops_of_a_step(plan: Plan, material: Material) -> Flops:
    """Counted on a copy, so that what a forward pass may change (running means, counters) does not begin with one more."""
    lm = copy_of(plan.lm)
    assert lm.module is not None
    lm.module.train()
    crops = next(batches(material.tokens, plan.protocol))
    return training_flops(partial(loss_of, lm, crops, plan.protocol.seed), partial(differentiate, lm))


def keep(run: Run, files: Folder | None) -> str:
    """Where the best weights of a training that failed are."""
    if files is None or not run.best:
        return ""
    files.save_best(run)
    return f" The best weights so far, those after {run.best_step} steps, are in {files.best}."
