"""Put new LoRA adapters into the linear layers of a model, by peft (Hu et al., "LoRA", 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pytest_lmeval.errors import SpecError, described
from pytest_lmeval.models._classifier import HEAD, calls, last_hidden
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._seeds import reseed

CONV1D = "Conv1D"  # the linear layer of GPT-2


def with_lora(lm: Model, layers: Sequence[str], rank: int, seed: int) -> Model:
    """The model with adapters of this rank (alpha twice that) in these layers, its own module changed. Only the adapters, and
    the head of a classifier, are trained. Raises SpecError without peft."""
    assert lm.module is not None
    assert lm.rebuild is not None
    try:
        import peft
    except ImportError as error:
        raise SpecError(f"LoRA needs peft: pip install 'pytest-lmeval[adapters]' ({error})") from error
    config: Any = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers))
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own affairs
        reseed(lm.device, seed)
        try:
            peft.inject_adapter_in_model(config, lm.module)
        except Exception as error:  # a module may hold anything
            raise SpecError(
                f"peft cannot put adapters into {lm.spec}: {described(error)}. Fine-tune all: method='full'."
            ) from error
    for name, parameter in lm.module.named_parameters():
        added = ".lora_" in name or name.startswith(f"{HEAD}.")
        parameter.requires_grad_(added)
        if added:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return replace(lm, step_fn=lm.rebuild(lm.module.eval()))


def linear_layers(lm: Model) -> list[str]:
    """The linear layers that a step calls, without the one that makes logits. Raises SpecError if there are none."""
    assert lm.module is not None
    called = calls(lm)
    hidden = last_hidden(lm, called)
    linear = {name for name, part in lm.module.named_modules() if isinstance(part, nn.Linear) or type(part).__name__ == CONV1D}
    found = sorted({call.name for call in called} & linear - {hidden.name if hidden.input else ""})
    if not found:
        raise SpecError(
            f"{lm.spec} calls no linear layer (nn.Linear) that an adapter could be put into. Fine-tune all of its weights: "
            "method='full'."
        )
    return found
