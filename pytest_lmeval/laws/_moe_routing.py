"""Recognise ties between experts, which rounding decides in a mixture of experts.

A router of any class takes the best k by `torch.topk`, which is recorded in two runs. If they took other experts although the
scores were equal up to rounding, the logits from that token on are not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MOST_EXPERTS = 4096
TIE = 1 << 12  # roundings of the scores' size: a smaller difference between two runs is rounding

Routing: TypeAlias = list[tuple[Tensor, int]]
"""Of each router: its scores [t, experts] for one row, in float64, and the number of experts it took."""


class _TopkRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scores: list[Tensor] = []
        self.k: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.topk.default and 1 < args[0].shape[-1] <= MOST_EXPERTS:
            dim = args[2] if len(args) > 2 else -1
            if dim in (-1, args[0].ndim - 1):
                self.scores.append(args[0].detach().to("cpu", torch.float64))
                self.k.append(int(args[1]))
        return function(*args, **(kwargs or {}))


def record_routing(run: Callable[[], Any], *, rows: int, row: int, sizes: list[int]) -> Routing:
    """Record the routers' scores for one row in a run in chunks of `sizes`; empty if the model has no router."""
    with _TopkRecorder() as recorder:
        run()
    layers, rest = divmod(len(recorder.scores), len(sizes))
    if not layers or rest:
        return []
    found = []
    for layer in range(layers):
        parts = []
        for size, scores in zip(sizes, recorder.scores[layer::layers], strict=True):
            if scores.numel() != rows * size * scores.shape[-1]:
                return []  # not one choice a token
            parts.append(scores.reshape(rows, size, -1)[row])
        found.append((torch.cat(parts), recorder.k[layer]))
    return found


def first_tie(one: Routing, other: Routing, dtype: torch.dtype) -> int | None:
    """The first token at which the two runs took other experts; None if there is none, or if it was no tie."""
    if len(one) != len(other):
        return None
    first: tuple[int, bool] | None = None
    for (scores, k), (others, _) in zip(one, other, strict=True):
        t = min(len(scores), len(others))
        chosen, chose = (x[:t].topk(k, dim=-1).indices.sort(-1).values for x in (scores, others))
        flipped = (chosen != chose).any(-1).nonzero()
        if len(flipped) and (first is None or int(flipped[0]) < first[0]):
            token = int(flipped[0])
            difference = float((scores[token] - others[token]).abs().max())
            size = max(1e-3, float(scores[token][scores[token].isfinite()].abs().max()))
            first = token, difference <= TIE * torch.finfo(dtype).eps * size
    return first[0] if first is not None and first[1] else None
