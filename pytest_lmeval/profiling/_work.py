"""Count what a step of a model needs at least, on any machine: operations, and bytes that it must move.

    bytes    weights that the step reads, each once (of a table, the rows that are looked up), + state read + state written

Decoding reads the whole state, and writes what it grows by, or all of it where it does not grow. A prompt reads no state and
writes all of it. Activations do not count, since they may stay in the caches: the bytes are a lower bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytest_lmeval.engine import Engine
from pytest_lmeval.models._flops import Flops, count_flops, training_flops
from pytest_lmeval.models._model import Model, State, multiplied, state_bytes, weights
from pytest_lmeval.models._tensors import parts
from pytest_lmeval.profiling._child import first_line
from pytest_lmeval.profiling._failures import failure_of
from pytest_lmeval.profiling._roofline import Peaks

aten = torch.ops.aten
LOOKUPS = {aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default}


@dataclass(frozen=True)
class Work:
    """Operations of one step, bytes that it must move, and the tokens that it reads, of all rows together."""

    flops: int
    bytes: int
    tokens: int

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def least_seconds(self, peaks: Peaks) -> float:
        """The least time by the roofline."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


def work_of(lm: Model, prompt: Tensor) -> dict[str, Work]:
    """The work of "prefill", a step over the prompt [b, t]; and of "decode", one token a row after it, if there is a state."""
    flops, read, state = _counted_step(lm, prompt, None)
    held = state_bytes(state)
    phases = {"prefill": Work(flops, read + held, prompt.shape[0] * prompt.shape[-1])}
    if lm.stateful:
        flops, read, state = _counted_step(lm, prompt[..., -1:], state)
        grown = state_bytes(state) - held
        phases["decode"] = Work(flops, read + held + (grown if grown > 0 else held), prompt.shape[0])
    return phases


def _counted_step(lm: Model, input_ids: Tensor, state: State | None) -> tuple[int, int, State]:
    """Operations, bytes of the weights that are read, and the new state. One step only, since it may use up `state`."""
    states, flops = list[State](), list[int]()

    def step() -> None:
        states.append(Engine(lm).step(input_ids, state, keep=1)[1])

    read = bytes_read(weights(lm.module), lambda: flops.append(count_flops(step)))
    return flops[0], read, states[0]


def training_work(lm: Model, prompt: Tensor) -> tuple[Flops | None, str | None]:
    """Operations of a pass over the prompt with all its logits, forward and backward; or None, and why there is no backward."""
    if reason := _not_trained(lm.module):
        return None, reason
    parameters = [p for p in weights(lm.module) if p.requires_grad]

    def loss() -> Tensor:
        """The sum of the logits: its gradient costs the products of any loss, whose own work is elementwise."""
        with torch.enable_grad():
            return lm.step(prompt, None)[0].float().sum()

    def backward(total: Tensor) -> None:
        torch.autograd.grad(total, parameters, allow_unused=True)  # leaves no gradient in the parameters

    try:
        return training_flops(loss, backward), None
    except Exception as error:  # noqa: BLE001 - a model that was made for inference may fail in any way
        return None, failure_of(error) or f"{type(error).__name__}: {first_line(error)}"


def _not_trained(module: nn.Module | None) -> str | None:
    """The reason why the backward pass is not that of a training step, or None. A weight without a gradient, such as a packed
    one of int8 or int4, leaves out half of its backward products."""
    if module is None:
        return "no torch module"
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return "no parameter requires a gradient"
    weights_multiplied = list(multiplied(module))
    frozen = [name for name, weight in weights_multiplied if not weight.requires_grad]
    if not frozen:
        return None
    return f"{len(frozen)} of the {len(weights_multiplied)} weights that are multiplied require no gradient, first {frozen[0]}"


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each storage behind the tensors by its address: a storage that tensors share counts once."""
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
