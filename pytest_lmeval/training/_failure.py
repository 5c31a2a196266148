"""Trainings that go wrong, told with what a person needs to see why."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pytest_lmeval.errors import ModelError, TrainingError
from pytest_lmeval.models._model import Model
from pytest_lmeval.training._protocol import Protocol, learning_rate
from pytest_lmeval.training._run import Run

PATIENCE, MARGIN = 3, 1.0  # evaluations in a row; nats a token


def differentiate(lm: Model, loss: Tensor) -> None:
    """Add the gradients of the loss to those of the parameters. Raises ModelError for a model that has none."""
    why = "it reads under torch.no_grad, or detaches what it computed"
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
    """The error for a step whose loss or gradients are not finite; `again` computes that loss once more."""
    before = f" ({run.losses[-1]:.6g} and {run.norms[-1]:.4g} one step before)" if run.losses else ""
    broken = broken_gradients(run, again)
    first = f"; {len(broken)} gradients are not finite, and backward came first to that of {broken[0]}" if broken else ""
    return TrainingError(
        f"{run.lm.spec} on {run.text}, step {run.step + 1}: the loss is {loss:.6g}, the gradient norm {norm:.4g}{before}, at "
        f"learning rate {rate:.3g}{first}. Such an update would destroy every weight, so the training stops before it. Look "
        "there for a division by zero, a root or logarithm of zero, or an overflow; else take a smaller lr or a longer warmup."
    )


def broken_gradients(run: Run, loss: Callable[[], Tensor]) -> list[str]:
    """The parameters whose gradients of this loss are not finite, in the order in which backward computes them."""
    found: list[str] = []

    def look(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                found.append(name)

        return hook

    run.optimizer.zero_grad()
    named = [(name, parameter) for name, parameter in run.module.named_parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(look(name)) for name, parameter in named]  # type: ignore[no-untyped-call]
    try:
        differentiate(run.lm, loss())
    finally:
        for handle in handles:
            handle.remove()
        run.optimizer.zero_grad()
    return found


def refuse_not_finite(run: Run, nats: Tensor) -> None:
    """Raise TrainingError for an evaluation in which a crop has no finite loss."""
    if torch.isfinite(nats).all():
        return
    wrong = int((~torch.isfinite(nats)).nonzero()[0])
    before = f" The last training loss was {run.losses[-1]:.6g}, its gradient norm {run.norms[-1]:.4g}." if run.losses else ""
    raise TrainingError(
        f"{run.lm.spec} on {run.text}: after {run.step} steps the loss of held-out crop {wrong} of {len(nats)} is "
        f"{float(nats[wrong])}.{before} Look for a division by zero, a logarithm of zero or an overflow in its eval mode."
    )


def refuse_divergence(run: Run, protocol: Protocol, steps: int) -> None:
    """Raise TrainingError where the last three evaluations were each worse by more than a nat a token than both an even guess
    (ln v) and the loss at the beginning. Without a held-out text, each is the mean training loss of `eval_every` steps."""
    kind, first, losses = losses_so_far(run, protocol)
    guess = math.log(run.lm.vocab_size)
    last = losses[-PATIENCE:]
    if len(last) < PATIENCE or any(loss <= max(guess, first) + MARGIN for _, loss in last):
        return
    rate = learning_rate(protocol, run.step - 1, steps)
    raise TrainingError(
        f"{run.lm.spec} on {run.text} diverged: after {', '.join(str(step) for step, _ in last)} steps its {kind} loss was "
        f"{', '.join(f'{loss:.4g}' for _, loss in last)} nats a token, where an even guess costs {guess:.4g} and it began with "
        f"{first:.4g}. The learning rate is {rate:.3g}, the last gradient norm was {run.norms[-1]:.4g}. Take a smaller lr or a "
        "longer warmup."
    )


def losses_so_far(run: Run, protocol: Protocol) -> tuple[str, float, list[tuple[int, float]]]:
    """What kind they are, the one at the beginning, and each with the steps done then."""
    if run.evaluations:
        found = [(step, float(nats.mean()) / protocol.seq_len) for step, nats in run.evaluations.items()]
        return "held-out", found[0][1], found
    every = protocol.eval_every
    parts = [(end, run.losses[max(0, end - every) : end]) for end in (*range(every, run.step, every), run.step)]
    return "training", run.losses[0], [(end, sum(part) / len(part)) for end, part in parts]
