"""The float64 twin of a model: where the reference comes from that both runs, full and chunked, are measured against."""

from __future__ import annotations

import copy
import dataclasses
import os

import torch
from torch import nn

from pytest_lmeval.models._model import Model, weights
from pytest_lmeval.models._tensors import unpack


def twin(model: Model, dtype: torch.dtype | None = torch.float64) -> Model | None:
    """A copy of the model with the same (already rounded) weights in `dtype` (None: as they are); None where it cannot be
    copied, or where the copy would take more than a quarter of the memory that is free.

    Packed weights become the plain numbers that they stand for. So what is rounded once, when a model is packed, is part of the
    model, and only what its arithmetic rounds at every step is error: weights of four bits can be proven exact."""
    if model.module is None or model.rebuild is None or not fits(model):
        return None
    try:
        module = copy.deepcopy(model.module)
        if dtype is not None:
            unpack(module, dtype)
            module.to(dtype)
        step_fn = model.rebuild(module)
    except Exception:  # noqa: BLE001 - fused, bound to its precision, or holding what cannot be copied
        return None
    return dataclasses.replace(model, module=module, step_fn=step_fn)


def fits(model: Model) -> bool:
    """Whether there is room for a copy of the model."""
    needed = 2 * sum(8 * tensor.numel() for tensor in weights(model.module))  # a copy, and its conversion
    if model.device.type == "cuda":
        return needed < torch.cuda.mem_get_info(model.device)[0] / 4
    try:
        return needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    except (AttributeError, ValueError, OSError):  # no such question on this system
        return needed < 4 << 30


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Change each weight at random by about one rounding of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + torch.finfo(dtype).eps * noise.to(parameter.device))
