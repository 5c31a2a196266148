"""Update a model by the gradients of a batch, read in parts where memory is short."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from pytest_lmeval.errors import ModelError, OutOfMemory
from pytest_lmeval.models._failures import NoMemory, failure_of, unless_full
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._seeds import generator_of
from pytest_lmeval.training._objective import Batch, Objective
from pytest_lmeval.training._protocol import Protocol, learning_rate
from pytest_lmeval.training._refusals import not_finite
from pytest_lmeval.training._run import Run


def update(run: Run, objective: Objective, batch: Batch, protocol: Protocol) -> None:
    """Take a step of the optimizer, and record loss and gradient norm. Raises TrainingError before it if one is not finite."""
    rate = learning_rate(protocol, run.step, objective.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    seed = (protocol.seed << 32) + run.step
    before = run.versions
    while isinstance(found := unless_full(partial(gradients, run, objective, batch, seed, protocol.clip)), NoMemory):
        run.optimizer.zero_grad()
        if run.versions != before:
            raise OutOfMemory(f"{run.lm.spec} had changed its buffers when memory ran out.", found.wanted)
        run.micro_batch = fewer_rows(run, len(batch), found.wanted)
    if not all(map(math.isfinite, found)):
        raise not_finite(run, *found, rate, again=partial(accumulate, run, objective, batch, seed))
    run.optimizer.step()
    run.losses.append(found[0])
    run.norms.append(found[1])


def gradients(run: Run, objective: Objective, batch: Batch, seed: int, clip: float | None) -> tuple[float, float]:
    """Leave the clipped gradients of a batch in the parameters; its loss, and the norm of the gradients before clipping."""
    loss = accumulate(run, objective, batch, seed)
    trained = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(trained, clip, norm)
    return loss, norm.item()


def accumulate(run: Run, objective: Objective, batch: Batch, seed: int) -> float:
    """Leave the gradients of the mean loss of a batch in the parameters, and return that loss.

    Its rows are read `micro_batch` at once, each part weighted by its rows, all with the random numbers that follow `seed`.
    """
    total, rows = 0.0, run.micro_batch or len(batch)
    generator_of(run.lm.device).manual_seed(seed)  # of dropout
    for first in range(0, len(batch), rows):
        part = batch[first : first + rows]
        loss = objective.loss(run.lm, part) * (len(part) / len(batch))
        if not first:
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
