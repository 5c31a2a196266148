"""Where the bytes of a model lie, and which of them a step reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_lmeval.models._tensors import parts

aten = torch.ops.aten
LOOKUPS = {aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The address of each storage behind the tensors, and its bytes: what is shared or looked at twice counts once."""
    held = (part.untyped_storage() for tensor in tensors for part in parts(tensor).values())
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def bytes_read(tensors: Iterable[Tensor], work: Callable[[], Any]) -> int:
    """The bytes of the tensors that `work()` reads, each once however often it is read.

    A view reads nothing; what is done to it reads the part that it shows (of stacked experts, the chosen ones). A lookup in
    a table reads the rows that it returns, at most the table.
    """
    reads = _Reads(storages(tensors))
    with reads:
        work()
    return reads.total()


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which parts of some storages enter an operator."""

    def __init__(self, watched: dict[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.parts: dict[int, dict[Any, int]] = {}  # address -> the part of it -> its bytes
        self.looked_up: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = {part.untyped_storage().data_ptr() for part in _tensors(result)}
        for index, tensor in enumerate(_tensors((args, kwargs))):
            address = tensor.untyped_storage().data_ptr()
            if address not in self.watched or address in views:
                continue
            if func in LOOKUPS and index == 0:
                found = sum(part.numel() * part.element_size() for part in _tensors(result))
                self.looked_up[address] = self.looked_up.get(address, 0) + found
            else:
                part = (tensor.storage_offset(), *sorted(zip(tensor.shape, tensor.stride(), strict=True)))  # w.T is w
                self.parts.setdefault(address, {})[part] = _extent(tensor)
        return result

    def total(self) -> int:
        return sum(
            min(size, sum(self.parts.get(address, {}).values()) + self.looked_up.get(address, 0))
            for address, size in self.watched.items()
        )


def _extent(tensor: Tensor) -> int:
    """Bytes that a tensor shows; an axis that was expanded shows the same ones again."""
    shown = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return prod(shown) * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from parts(value).values()
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
