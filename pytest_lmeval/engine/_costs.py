"""Estimate what calls, tokens and attention cost a model, from what its calls do: the same on every run and on a busy machine.

A call of n tokens, which see p pairs of tokens, costs about as much as

    call + n + p / reach    tokens

Operations are counted as they are called, and their rates are rough ones of a kind of device: packs and batches of about the
right size cost nearly the same.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_lmeval.engine._policy import Policy
from pytest_lmeval.models._failures import OUT_OF_MEMORY, failure_of
from pytest_lmeval.models._flops import count_flops
from pytest_lmeval.models._model import Model, weights
from pytest_lmeval.models._tensors import nbytes
from pytest_lmeval.models._weak_cache import WeakCache
from pytest_lmeval.records._certificate import Costs

COUNTED = (32, 64)  # tokens of the calls whose operations are counted
UNKNOWN = Costs(call=64, reach=4096)  # of a model whose operations cannot be counted
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


def costs_of(lm: Model, policy: Policy | None = None) -> Costs:
    """What calls cost a model: what the policy says, or else as its own operations are counted, once."""
    known = None if policy is None else policy.costs
    return known or COSTS.value(lm.step_fn, lambda: _counted(lm))


def _counted(lm: Model) -> Costs:
    if lm.codebooks is not None or (lm.limit or COUNTED[1]) < COUNTED[1]:
        return UNKNOWN
    try:
        with torch.no_grad():
            short, long = (count_flops(lambda: lm.step(lm.random_ids(1, n), keep=1)) / n for n in COUNTED)  # noqa: B023
            starts = _Starts()
            with starts:
                lm.step(lm.random_ids(1, 2), keep=1)
    except Exception as error:  # a model of which operations cannot be counted may fail in any way
        if failure_of(error) == OUT_OF_MEMORY:
            raise
        return UNKNOWN
    pair = max(0.0, long - short) / (COUNTED[1] - COUNTED[0])
    token, rates = short - COUNTED[0] * pair, RATES.get(lm.device.type, RATES["cpu"])
    if token <= 0:
        return UNKNOWN
    read = sum(map(nbytes, weights(lm.module)))
    call = (rates.per_byte * read + rates.per_start * starts.count) / token
    return Costs(
        call=power_of_two(min(call, rates.most)),
        reach=power_of_two(token / pair) if pair else 0,
    )


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
