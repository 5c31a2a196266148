"""Put a linear head over the last hidden state of a model, in place of its predictions of tokens.

The last hidden state is what the first of these modules, from the last that a step calls backwards, takes or gives: one that
makes as many numbers of a token as there are logits, of fewer or more (an output layer), or any other that gives [b, t, d].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lmeval.errors import SpecError
from pytest_lmeval.models._model import Model, State, StepFn

HEAD = "class_head"  # the name of the module that is added


@dataclass(frozen=True)
class Call:
    """A call of a module without parts in a step: its name, and the sizes of its input and output; () if it is no tensor."""

    name: str
    input: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(frozen=True)
class LastHidden:
    """Where the last hidden state of a model is: the `input` of a module, or else its output, and its width."""

    name: str
    input: bool
    width: int


def calls(lm: Model) -> list[Call]:
    """The calls of modules without parts in a step of two tokens, in order."""
    assert lm.module is not None
    found: list[Call] = []

    def seen(name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        found.append(Call(name, _shape(given), _shape(output)))

    parts = [(name, part) for name, part in lm.module.named_modules() if not any(part.children())]
    handles = [part.register_forward_hook(partial(seen, name)) for name, part in parts]
    try:
        with torch.no_grad():
            lm.step(torch.zeros(1, 2, dtype=torch.long, device=lm.device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def last_hidden(lm: Model, called: Sequence[Call]) -> LastHidden:
    """Where the last hidden state is. Raises SpecError if no module takes or gives it."""
    for call in reversed(called):
        if len(call.output) != 3 or call.output[1] != 2:
            continue
        if call.output[-1] != lm.vocab_size:
            return LastHidden(call.name, False, call.output[-1])
        if len(call.input) == 3 and call.input[-1] != lm.vocab_size:
            return LastHidden(call.name, True, call.input[-1])
    raise SpecError(
        f"{lm.spec} calls no module that takes or gives a hidden state [rows, tokens, width] before its logits, so there is "
        "nothing to put a head on. Fine-tune it, and what it is compared with, with classes='verbaliser'."
    )


def classifier(lm: Model, classes: Sequence[str], seed: int) -> Model:
    """The model as a classifier, its own module changed: logits [b, t, classes] of a new linear layer without bias, drawn with
    this seed, over the last hidden state. The layer that makes the logits of tokens stays, unused."""
    assert lm.module is not None
    assert lm.rebuild is not None
    hidden = last_hidden(lm, calls(lm))
    head = nn.Linear(hidden.width, len(classes), bias=False, device="meta").to_empty(device="cpu")  # draws no random numbers
    nn.init.normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    wide = torch.promote_types(lm.dtype, torch.float32)
    lm.module.add_module(HEAD, head.to(lm.device, wide))
    rebuild = partial(_step_of, lm.rebuild, hidden)
    return replace(
        lm, step_fn=rebuild(lm.module), rebuild=rebuild, vocab_size=len(classes), classes=tuple(classes), fast_weights=None
    )


def _step_of(make: Any, hidden: LastHidden, module: nn.Module) -> StepFn:
    """The step of a classifier whose body is stepped by what `make` makes."""
    body, head = make(module), module.get_submodule(HEAD)
    place = module.get_submodule(hidden.name)

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        kept: list[Any] = []

        def keep_input(part: nn.Module, given: tuple[Any, ...]) -> None:
            kept.append(given[0])

        def keep_output(part: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        handle = place.register_forward_pre_hook(keep_input) if hidden.input else place.register_forward_hook(keep_output)
        try:
            _, state = body(input_ids, state, keep)
        finally:
            handle.remove()
        return head(kept[-1].to(head.weight.dtype)), state

    return step_fn


def _shape(value: Any) -> tuple[int, ...]:
    first = value[0] if isinstance(value, tuple) and value else value
    return tuple(first.shape) if isinstance(first, Tensor) else ()
