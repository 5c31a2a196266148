"""Refuse to go on with a training that has become worthless: a loss that is not finite, or one that diverged."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pytest_lmeval.errors import TrainingError
from pytest_lmeval.models._failures import unless_full
from pytest_lmeval.training._protocol import Protocol, learning_rate
from pytest_lmeval.training._run import Run

PATIENCE, MARGIN = 3, 1.0  # consecutive evaluations; nats per token


def not_finite(run: Run, loss: float, norm: float, rate: float, again: Callable[[], float]) -> TrainingError:
    """The error for a step whose loss or gradients are not finite; `again` recomputes these gradients."""
    before = f" ({run.losses[-1]:.6g} and {run.norms[-1]:.4g} one step before)" if run.losses else ""
    broken = _broken_gradients(run, again)
    first = f"; {len(broken)} gradients are not finite, in backward order the first is that of {broken[0]}" if broken else ""
    return TrainingError(
        f"{run.lm.spec} on {run.text}, step {run.step + 1}: the loss is {loss:.6g}, the gradient norm {norm:.4g}{before}, at "
        f"learning rate {rate:.3g}{first}. Such an update would destroy every weight, so the training stops before it. Look "
        "there for a division by zero, a root or logarithm of zero, or an overflow; else take a smaller lr or a longer warmup."
    )


def _broken_gradients(run: Run, differentiated: Callable[[], float]) -> list[str]:
    """The parameters whose gradients are not finite, in the order in which backward computes them."""
    found: list[str] = []

    def look(name: str, parameter: Tensor) -> None:
        if name not in found and parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            found.append(name)

    run.optimizer.zero_grad()
    named = [(name, parameter) for name, parameter in run.module.named_parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(partial(look, name)) for name, parameter in named]  # type: ignore[no-untyped-call]
    try:
        unless_full(differentiated)  # what was found so far says enough
    finally:
        for handle in handles:
            handle.remove()
        run.optimizer.zero_grad()
    return found


def refuse_not_finite(run: Run, nats: Tensor, what: str) -> None:
    """Raise TrainingError if a held-out crop, or question, has no finite loss."""
    if torch.isfinite(nats).all():
        return
    wrong = int((~torch.isfinite(nats)).nonzero()[0])
    before = f" The last training loss was {run.losses[-1]:.6g}, its gradient norm {run.norms[-1]:.4g}." if run.losses else ""
    raise TrainingError(
        f"{run.lm.spec} on {run.text}: after {run.step} steps the loss of held-out {what} {wrong} of {len(nats)} is "
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
