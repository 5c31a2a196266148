"""Train: update on batches of crops, evaluate now and then, and keep the best weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
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
from pytest_lmeval.errors import ModelError, TrainingError
from pytest_lmeval.measures._perplexity import Progress
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._seeds import generator_of
from pytest_lmeval.models._sources import load
from pytest_lmeval.profiling._clock import seconds
from pytest_lmeval.profiling._flops import Flops, training_flops
from pytest_lmeval.profiling._peak import peak_memory
from pytest_lmeval.records._journal import Saver
from pytest_lmeval.training._plan import Plan, Source, batches, held_out_batches, plan_for, read, steps_an_epoch
from pytest_lmeval.training._protocol import Protocol, learning_rate
from pytest_lmeval.training._result import TrainResult, record_of
from pytest_lmeval.training._run import Folder, Run, new_run
from pytest_lmeval.training._weights import copy_of, fill

DEFAULT = Protocol()
PATIENCE, MARGIN = 3, 1.0  # consecutive evaluations; nats per token


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
                _learn(run, tokens, held_out, protocol, steps, saver, progress)
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
    loss = loss_of(run.lm, crops, seed)
    run.optimizer.zero_grad()  # not before the forward pass: freed memory would be allocated anew in each step
    differentiate(run.lm, loss)
    trained = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    figures = loss.item(), norm.item()
    if not all(map(math.isfinite, figures)):
        raise not_finite(run, *figures, rate, again=partial(loss_of, run.lm, crops, seed))
    if protocol.clip is not None:
        nn.utils.clip_grads_with_norm_(trained, protocol.clip, norm)
    run.optimizer.step()
    run.losses.append(figures[0])
    run.norms.append(figures[1])


def loss_of(lm: Model, crops: Tensor, seed: int) -> Tensor:
    """Mean loss of crops [b, t + 1], each read from an empty state, in nats per token; `seed` is that of dropout."""
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
    """Counts a step of a copy of the model, which it may change (running means, counters)."""
    assert lm.module is not None
    lm.module.train()
    return training_flops(partial(loss_of, lm, crops, seed), partial(differentiate, lm))


def differentiate(lm: Model, loss: Tensor) -> None:
    """Add the gradients of the loss to those of the parameters. Raises ModelError if the loss has none."""
    why = "the model runs under torch.no_grad, or detaches what it computed"
    try:
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
            return
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error)
    raise ModelError(f"{lm.spec} can be scored, but not trained, since its loss has no gradient: {why}")


def not_finite(run: Run, loss: float, norm: float, rate: float, again: Callable[[], Tensor]) -> TrainingError:
    """The error for a step whose loss or gradients are not finite; `again` recomputes that loss."""
    before = f" ({run.losses[-1]:.6g} and {run.norms[-1]:.4g} one step before)" if run.losses else ""
    broken = broken_gradients(run, again)
    first = f"; {len(broken)} gradients are not finite, in backward order the first is that of {broken[0]}" if broken else ""
    return TrainingError(
        f"{run.lm.spec} on {run.text}, step {run.step + 1}: the loss is {loss:.6g}, the gradient norm {norm:.4g}{before}, at "
        f"learning rate {rate:.3g}{first}. Such an update would destroy every weight, so the training stops before it. Look "
        "there for a division by zero, a root or logarithm of zero, or an overflow; else take a smaller lr or a longer warmup."
    )


def broken_gradients(run: Run, loss: Callable[[], Tensor]) -> list[str]:
    """The parameters whose gradients of this loss are not finite, in the order in which backward computes them."""
    found: list[str] = []

    def look(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            found.append(name)

    run.optimizer.zero_grad()
    named = [(name, parameter) for name, parameter in run.module.named_parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(partial(look, name)) for name, parameter in named]  # type: ignore[no-untyped-call]
    try:
        differentiate(run.lm, loss())
    finally:
        for handle in handles:
            handle.remove()
        run.optimizer.zero_grad()
    return found


def refuse_not_finite(run: Run, nats: Tensor) -> None:
    """Raise TrainingError if a held-out crop has no finite loss."""
    if torch.isfinite(nats).all():
        return
    wrong = int((~torch.isfinite(nats)).nonzero()[0])
    before = f" The last training loss was {run.losses[-1]:.6g}, its gradient norm {run.norms[-1]:.4g}." if run.losses else ""
    raise TrainingError(
        f"{run.lm.spec} on {run.text}: after {run.step} steps the loss of held-out crop {wrong} of {len(nats)} is "
        f"{float(nats[wrong])}.{before} Look for a division by zero, a logarithm of zero or an overflow in its eval mode."
    )


def refuse_divergence(run: Run, protocol: Protocol, steps: int) -> None:
    """Raise TrainingError if the last three evaluations (without a held-out text: means of `eval_every` training losses) each
    exceed a uniform guess and the initial loss by more than a nat per token."""
    every, kind = protocol.eval_every, "held-out" if run.evaluations else "training"
    if run.evaluations:
        losses = [(step, float(nats.mean()) / protocol.seq_len) for step, nats in run.evaluations.items()]
        first = losses[0][1]
    else:
        parts = [(end, run.losses[max(0, end - every) : end]) for end in (*range(every, run.step, every), run.step)]
        losses, first = [(end, sum(part) / len(part)) for end, part in parts], run.losses[0]
    guess, last = math.log(run.lm.vocab_size), losses[-PATIENCE:]
    if len(last) < PATIENCE or any(loss <= max(guess, first) + MARGIN for _, loss in last):
        return
    rate = learning_rate(protocol, run.step - 1, steps)
    raise TrainingError(
        f"{run.lm.spec} on {run.text} diverged: after {', '.join(str(step) for step, _ in last)} steps its {kind} loss was "
        f"{', '.join(f'{loss:.4g}' for _, loss in last)} nats per token; it began with {first:.4g}, and a uniform guess costs "
        f"{guess:.4g}. Take a smaller lr (it is {rate:.3g}) or a longer warmup. The last gradient norm was {run.norms[-1]:.4g}."
    )
