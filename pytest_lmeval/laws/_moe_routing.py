"""Routers of mixtures of experts: where two experts are as good as each other, rounding decides, and nothing is wrong.

A router scores every expert for a token and takes the best k, by `torch.topk`. That call is watched (whatever the
router's class is called), in the full run and in the chunked one. Where the two chose other experts although the scores were
equal up to rounding, what differs from that token on says nothing about the state, and is not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MOST_EXPERTS = 4096
TIE = 1 << 12  # roundings, of the scores' size, that two runs may differ by and still be the same but for rounding

Routing: TypeAlias = list[tuple[Tensor, int]]
"""Of each router: the scores [t, experts] that it gave to one row, in float64, and how many experts it took."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scores: list[Tensor] = []
        self.k: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        along = args[2] if len(args) > 2 else -1
        last = along in (-1, args[0].ndim - 1) if function is torch.ops.aten.topk.default else False
        if last and 1 < args[0].shape[-1] <= MOST_EXPERTS:
            self.scores.append(args[0].detach().to("cpu", torch.float64))
            self.k.append(int(args[1]))
        return function(*args, **(kwargs or {}))


def recorded(run: Callable[[], Any], *, rows: int, row: int, pieces: list[int]) -> Routing:
    """What the routers of a model chose in a run; empty where it has none."""
    with _Watch() as watch:
        run()
    layers, rest = divmod(len(watch.scores), len(pieces))
    if not layers or rest:
        return []
    found = []
    for layer in range(layers):
        parts = []
        for size, scores in zip(pieces, watch.scores[layer::layers], strict=True):
            if scores.numel() != rows * size * scores.shape[-1]:
                return []  # not one choice a token
            parts.append(scores.reshape(rows, size, -1)[row])
        found.append((torch.cat(parts), watch.k[layer]))
    return found


def until_first_tie(one: Routing, other: Routing, dtype: torch.dtype) -> int | None:
    """The first token for which the two runs took other experts; None if there is none, or if it was no tie."""
    if len(one) != len(other):
        return None
    first: tuple[int, bool] | None = None
    for (scores, k), (others, _) in zip(one, other, strict=True):
        t = min(len(scores), len(others))
        chosen, chose = (x[:t].topk(k, dim=-1).indices.sort(-1).values for x in (scores, others))
        flipped = (chosen != chose).any(-1).nonzero()
        if len(flipped) and (first is None or int(flipped[0]) < first[0]):
            place = int(flipped[0])
            moved = float((scores[place] - others[place]).abs().max())
            size = max(1e-3, float(scores[place][scores[place].isfinite()].abs().max()))
            first = place, moved <= TIE * torch.finfo(dtype).eps * size
    return first[0] if first is not None and first[1] else None
