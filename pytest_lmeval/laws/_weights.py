"""Copy a model's weights, in float64 for references, and put them back after reading."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pytest_lmeval.models._identity import weights_digest
from pytest_lmeval.models._model import Model, weights
from pytest_lmeval.models._tensors import parts, unpack


def float64_copy(model: Model) -> Model | None:
    """A copy with the same (already rounded) weights in float64; see `copy_of`."""
    return copy_of(model, torch.float64)


def copy_of(model: Model, dtype: torch.dtype | None = None) -> Model | None:
    """A copy of the model; None if it cannot be copied, as one that spans the ranks of a run, whose copies not all of them can
    make, or would need more than a quarter of the free memory.

    With a dtype, packed weights become the plain numbers that they stand for, so that packed models can be proven exact too."""
    if model.module is None or model.rebuild is None or model.spans_ranks or not fits(model):
        return None
    try:
        module = copy.deepcopy(model.module)
        if dtype is not None:
            unpack(module, dtype)
            nn.Module.to(module, dtype)  # that of transformers refuses a model that was quantized
        step_fn = model.rebuild(module)
    except Exception:  # noqa: BLE001 - fused, bound to its precision, or holding what cannot be copied
        return None
    return dataclasses.replace(model, module=module, step_fn=step_fn, compiled="")


def fits(model: Model) -> bool:
    """Whether there is memory for a copy of the model."""
    needed = 2 * sum(8 * tensor.numel() for tensor in weights(model.module))  # a copy, and its conversion
    if model.device.type == "cuda":
        return needed < torch.cuda.mem_get_info(model.device)[0] / 4
    try:
        return needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    except (AttributeError, ValueError, OSError):  # this system does not tell
        return needed < 4 << 30


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Change each weight at random by about one rounding of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + torch.finfo(dtype).eps * noise.to(parameter.device))


@contextmanager
def preserve_weights(lm: Model) -> Iterator[Callable[[], str | None]]:
    """Put parameters and buffers back on exit. The value, called, says which of them have changed, or None.

    Without memory for a copy, a change is only detected, by a hash.
    """
    module = lm.module
    if module is None:
        yield lambda: None
        return
    saved = {name: tensor.detach().clone() for name, tensor in _tensors(module).items()} if fits(lm) else {}
    before = b"" if saved else weights_digest(lm)
    checked = _saved_names(module) - lm.mutable_buffers

    def changed() -> str | None:
        now = _tensors(module)
        names = [name for name, old in saved.items() if name in checked and not (name in now and _bit_equal(now[name], old))]
        if not names and (saved or weights_digest(lm) == before):
            return None
        which = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
        return f"reading changed the model's parameters or buffers{which}."

    try:
        yield changed
    finally:
        for name, old in saved.items():
            _put_back(module, name, old)


def _saved_names(module: nn.Module) -> set[str]:
    """The names of parameters and buffers that are saved; others are tables that a model computes for itself.

    The module's `state_dict` is not asked: those of some libraries repack the weights.
    """
    buffers = {
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules()
        for name in part._buffers.keys() - part._non_persistent_buffers_set
    }
    return buffers | {name for name, _ in module.named_parameters()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _put_back(module: nn.Module, name: str, old: Tensor) -> None:
    path, _, own = name.rpartition(".")
    part = module.get_submodule(path)
    current = getattr(part, own, None)
    if isinstance(current, Tensor) and current.shape == old.shape and current.dtype == old.dtype:
        if not _bit_equal(current, old):
            with torch.no_grad():
                current.copy_(old)
    elif own in part._buffers:
        part._buffers[own] = old


def _bit_equal(one: Tensor, other: Tensor) -> bool:
    ours, theirs = parts(one), parts(other)
    pairs = [(part, theirs.get(name)) for name, part in ours.items()]
    return ours.keys() == theirs.keys() and all(
        b is not None and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs
    )
