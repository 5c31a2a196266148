"""Find the storages of a model's tensors, and count the bytes of them that a step reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytest_lmeval.models._tensors import parts

aten = torch.ops.aten
LOOKUPS = {aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The address of each storage behind the tensors, and its bytes: a storage that tensors share counts once."""
    held = (part.untyped_storage() for tensor in tensors for part in parts(tensor).values())
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def bytes_read(tensors: Iterable[Tensor], work: Callable[[], Any]) -> int:
    """The bytes of the tensors that `work()` reads, each once however often it is read.

    Making a view reads nothing; an operator on it reads the part that it shows (of stacked experts, the chosen ones). A lookup
    in a table reads the rows that it returns, at most the table.
    """
    reads = _Reads(storages(tensors))
    with reads:
        work()
    return sum(
        min(size, sum(reads.parts.get(address, {}).values()) + reads.looked_up[address])
        for address, size in reads.watched.items()
    )


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which parts of some storages are arguments of an operator."""

    def __init__(self, watched: dict[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.parts: dict[int, dict[Any, int]] = {}  # address -> the part of it -> its bytes
        self.looked_up = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = {part.untyped_storage().data_ptr() for part in _tensors(result)}
        for index, tensor in enumerate(_tensors((args, kwargs))):
            address = tensor.untyped_storage().data_ptr()
            if address not in self.watched or address in views:
                continue
            if func in LOOKUPS and index == 0:
                self.looked_up[address] += sum(part.numel() * part.element_size() for part in _tensors(result))
            else:
                part = (tensor.storage_offset(), *sorted(zip(tensor.shape, tensor.stride(), strict=True)))  # w.T is w
                self.parts.setdefault(address, {})[part] = _extent(tensor)
        return result


def _extent(tensor: Tensor) -> int:
    """Bytes that a tensor shows; an expanded axis shows the same ones again."""
    shown = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return prod(shown) * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield from parts(leaf).values()
