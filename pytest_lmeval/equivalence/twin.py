"""The float64 twin of a model: where the reference comes from that both runs, full and chunked, are measured against."""

from __future__ import annotations

import copy
import dataclasses
import os

import torch

from pytest_lmeval.lm import Model, weights


def twin(model: Model, dtype: torch.dtype = torch.float64) -> Model | None:
    """A copy of the model with the same (already rounded) weights in `dtype`; None where it cannot be copied, or where the
    copy would take more than a quarter of the memory that is free."""
    if model.module is None or model.rebuild is None or not _fits(model):
        return None
    try:
        module = copy.deepcopy(model.module).to(dtype)
    except (RuntimeError, TypeError, NotImplementedError, copy.Error):
        return None  # quantized, fused or otherwise bound to its precision
    return dataclasses.replace(model, module=module, advance=model.rebuild(module), remembered={})


def _fits(model: Model) -> bool:
    needed = 2 * sum(8 * tensor.numel() for tensor in weights(model.module))  # a copy, and its conversion
    if model.device.type == "cuda":
        return needed < torch.cuda.mem_get_info(model.device)[0] / 4
    try:
        return needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    except (AttributeError, ValueError, OSError):  # no such question on this system
        return needed < 4 << 30
