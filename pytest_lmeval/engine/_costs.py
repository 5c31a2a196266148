"""Estimate what calls, tokens and attention cost a model, from what its calls do: the same on every run and on a busy machine.

A call of n tokens, which see p pairs of tokens, costs about as much as

    call + n + p / reach    tokens

Operations are counted as they are called, and their rates are rough ones of a kind of device: packs and batches of about the
right size cost nearly the same.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_lmeval.engine._policy import USUAL
from pytest_lmeval.models._failures import OUT_OF_MEMORY, NoMemory, failure_of, unless_full
from pytest_lmeval.models._flops import count_flops
from pytest_lmeval.models._model import Model, StepFn, weights
from pytest_lmeval.models._tensors import nbytes
from pytest_lmeval.models._weak_cache import WeakCache
from pytest_lmeval.records._certificate import Costs

COUNTED = (128, 256)  # tokens of the calls whose operations are counted
SMALL = 20_000_000  # numbers in the weights of a model that is read sooner than it is copied
COSTS = WeakCache[Costs]()  # by `step_fn`


class Rates(NamedTuple):
    """What a kind of device does in the same time.

    per_byte   floating-point operations while a byte of weights is read
    per_start  the same while an operator is started
    most       tokens that a call costs at most: a small model is all overhead, and cheap however it is read
    """

    per_byte: float
    per_start: float
    most: int


RATES = {"cpu": Rates(12, 2.5e5, 64), "mps": Rates(30, 1e8, 1 << 10), "cuda": Rates(75, 3e9, 1 << 14)}


def costs_of(lm: Model) -> Costs:
    """What calls cost a model, from its own operations, which are counted once; USUAL if that is not possible."""
    found = unless_full(lambda: COSTS.value(lm.step_fn, lambda: _counted(lm)))
    return USUAL if isinstance(found, NoMemory) else found


def _counted(lm: Model) -> Costs:
    sizes = [min(size, lm.limit or size) for size in COUNTED]
    if lm.codebooks is not None or sizes[0] == sizes[1]:
        return USUAL
    try:
        short, long = (_operations(lm, size) / size for size in sizes)
        starts = _Starts()
        with torch.no_grad(), starts:
            lm.step(lm.random_ids(1, 2), keep=1)
    except Exception as error:  # a model of which operations cannot be counted may fail in any way
        if failure_of(error) == OUT_OF_MEMORY:
            raise
        return USUAL
    pair = max(0.0, long - short) / (sizes[1] - sizes[0])
    token, rates = short - sizes[0] * pair, RATES.get(lm.device.type, RATES["cpu"])
    if token <= 0:
        return USUAL
    read = sum(map(nbytes, weights(lm.module)))
    call = (rates.per_byte * read + rates.per_start * starts.count) / token
    return Costs(
        call=power_of_two(min(call, rates.most)),
        reach=power_of_two(token / pair) if pair else 0,
    )


def _operations(lm: Model, size: int) -> int:
    """The operations of a call of so many tokens: of a large model by shapes alone, if it can be read so."""
    ids = lm.random_ids(1, size)

    def step(step_fn: StepFn, input_ids: Tensor) -> int:
        with torch.no_grad():
            return count_flops(lambda: step_fn(input_ids, None, 1))

    if sum(tensor.numel() for tensor in weights(lm.module)) > SMALL:
        try:
            return step(_without_data(lm), ids.to("meta"))
        except Exception:  # noqa: BLE001 - what it computes depends on numbers, or is not in its tensors
            pass
    return step(lm.step_fn, ids)


def _without_data(lm: Model) -> StepFn:
    """The step of a copy of the model whose tensors have shapes and no data."""
    if lm.module is None or lm.rebuild is None:
        raise ValueError("it has no module that could be copied")
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in weights(lm.module)}
    parameters = {id(tensor): nn.Parameter(empty[id(tensor)], tensor.requires_grad) for tensor in lm.module.parameters()}
    return lm.rebuild(copy.deepcopy(lm.module, {**empty, **parameters}))


def power_of_two(value: float) -> int:
    """The nearest power of two, by ratio, at least 1.

    >>> power_of_two(25.2), power_of_two(0.3)
    (32, 1)
    """
    return 1 << max(0, round(math.log2(max(value, 1.0))))


class _Starts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
