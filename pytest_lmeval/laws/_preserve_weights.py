"""A model is left as it was found: parameters and buffers are put back, and what was changed is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pytest_lmeval.laws._float64_copy import fits
from pytest_lmeval.models._identity import weights_digest
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._tensors import parts


@contextmanager
def preserve_weights(lm: Model) -> Iterator[Callable[[], str | None]]:
    """Put parameters and buffers back as they were. The value, called, says which of them are not as they were.

    Where there is no room for a copy of them, a change is noticed only, by their hash (see `models._identity.weights_digest`).
    """
    module = lm.module
    if module is None:
        yield lambda: None
        return
    saved = {name: tensor.detach().clone() for name, tensor in _tensors(module).items()} if fits(lm) else {}
    before = b"" if saved else weights_digest(lm)
    lasting = module.state_dict(keep_vars=True).keys()  # other buffers are tables that a model fills for itself

    def changed() -> str | None:
        now = _tensors(module)
        names = [
            name
            for name, old in saved.items()
            if name in lasting and name not in lm.mutable_buffers and not (name in now and _equal(now[name], old))
        ]
        if not names and (saved or weights_digest(lm) == before):
            return None
        which = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
        return f"the model's parameters or buffers{which} are not what they were before it was read from."

    try:
        yield changed
    finally:
        for name, old in saved.items():
            _put_back(module, name, old)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _put_back(module: nn.Module, name: str, old: Tensor) -> None:
    path, _, own = name.rpartition(".")
    part = module.get_submodule(path)
    current = getattr(part, own, None)
    if isinstance(current, Tensor) and current.shape == old.shape and current.dtype == old.dtype:
        if not _equal(current, old):
            with torch.no_grad():
                current.copy_(old)
    elif own in part._buffers:
        part._buffers[own] = old


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, no-numbers included."""
    ours, theirs = parts(one), parts(other)
    return ours.keys() == theirs.keys() and all(_equal_plain(part, theirs[name]) for name, part in ours.items())


def _equal_plain(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
