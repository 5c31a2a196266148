"""Measure how much the fast weights of a model change while it reads a text.

After every chunk (of 512 tokens at least), in Frobenius norms, since the chunk before and (distance) since the first token:

    change = |after - before| / max(|after|, |before|)        0: none; 1: from zero; at most 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.errors import ModelError, NotFiniteError
from pytest_lmeval.models._model import Model, State
from pytest_lmeval.records._measured import Record, Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._loss_accumulator import MOST_CURVES, FastWeightSums, LossAccumulator

TOKENS_BETWEEN = 512  # the fewest tokens between two measurements, so that measuring costs less than 2 % of reading
NAMED = 8  # the most weights that a warning names


@dataclass(frozen=True)
class FastWeights:
    """The fast weights of a model in a record.

    count     the number of tensors
    changed, unchanged   their names
    change    mean relative change a chunk (of 512 tokens at least), by tokens read
    distance  mean relative distance from their initial values at the end
    """

    count: int
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    change: Series
    distance: Value


class Monitor:
    """Adds the changes of fast weights to `LossAccumulator.fast_weights`; keeps copies, since a step may write to its state."""

    def __init__(self, lm: Model, sums: LossAccumulator, initial: dict[str, Tensor]) -> None:
        self.lm, self.names = lm, list(initial)
        self.initial = self.before = copies(initial)
        self.sequence = (len(sums.documents), sums.window)
        self.tokens, self.chunks = sums.tokens, sums.chunks_seen
        if sums.fast_weights is None:
            sums.fast_weights = FastWeightSums(tuple(initial), np.zeros(len(initial)), np.zeros(len(initial)))
        if sums.state is not None:
            self.before = self._copies_of(sums.state)

    def measure(self, sums: LossAccumulator, *, last: bool = False) -> bool:
        """Measure the changes, unless fewer than `TOKENS_BETWEEN` tokens were read and more are to come (not `last`). Returns
        whether all chunks are measured."""
        assert sums.fast_weights is not None
        tokens = sums.tokens - self.tokens
        pending = sums.chunks_seen > self.chunks
        if not pending or (tokens < TOKENS_BETWEEN and not last):
            return not pending
        now = self._copies_of(sums.state)
        if (sequence := (len(sums.documents), sums.window)) != self.sequence:
            self.before, self.sequence = self.initial, sequence
        found = torch.stack([relative(now, self.before), relative(now, self.initial)]).tolist()
        change, distance = np.array(found, dtype=np.float64)
        if not (finite := np.isfinite(change + distance)).all():
            raise NotFiniteError(
                f"the fast weight {self.names[int(np.argmin(finite))]} of {self.lm.spec} is not finite after token "
                f"{sums.scored} of the stream: all later logits mean nothing. Lower its inner learning rate."
            )
        sums.fast_weights.add(tokens, change, distance)
        self.before, self.tokens, self.chunks = now, sums.tokens, sums.chunks_seen
        return True

    def _copies_of(self, state: State) -> Weights:
        assert self.lm.fast_weights is not None
        with torch.no_grad():
            found = self.lm.fast_weights(state)
        if list(found) != self.names:
            raise ModelError(
                f"{self.lm.spec} named the fast weights {', '.join(self.names)} before it read, and afterwards "
                f"{', '.join(found) or 'none'}, so their change cannot be measured. fast_weights(state) has to name the same."
            )
        return copies(found)


@dataclass(frozen=True)
class Weights:
    """Copies of the fast weights, in float32 at least, and their norms [n]."""

    tensors: list[Tensor]
    norms: Tensor


def monitor(lm: Model, sums: LossAccumulator) -> Monitor | None:
    """A monitor of the fast weights of `lm`; None if it has none. Raises ModelError for anything but a dict of tensors."""
    if lm.fast_weights is None:
        return None
    with torch.no_grad():
        initial: Any = lm.fast_weights(None)
    if not isinstance(initial, dict) or not all(isinstance(x, Tensor) for x in initial.values()):
        raise ModelError(
            f"{lm.spec}: fast_weights(None) returned {type(initial).__name__}; expected a dict from names to tensors, the fast "
            "weights before the first token, which later ones are compared with."
        )
    return Monitor(lm, sums, initial) if initial else None


def copies(weights: dict[str, Tensor]) -> Weights:
    tensors = [x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in weights.values()]
    return Weights(tensors, norms(tensors))


def norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(x).to(tensors[0].device) for x in tensors])


def relative(now: Weights, before: Weights) -> Tensor:
    """The distance of each from before, relative to the larger of its two norms, [n]."""
    distance = norms([x - y for x, y in zip(now.tensors, before.tensors, strict=True)])
    return distance / torch.maximum(now.norms, before.norms).clamp(min=torch.finfo(distance.dtype).tiny)


def details_of(sums: FastWeightSums, lm: Model, tokens: int) -> dict[str, Any]:
    """The details of a record, with a warning if some fast weights did not change."""
    unchanged = [name for name, total in zip(sums.names, sums.change, strict=True) if not total]
    changed = [name for name in sums.names if name not in set(unchanged)]
    found = {"fast_weights": len(sums.names), "changed_fast_weights": changed, "unchanged_fast_weights": unchanged}
    return {**found, "warnings": [warning(lm.spec, len(sums.names), unchanged, tokens)]} if unchanged else found


def warning(spec: str, count: int, unchanged: Sequence[str], tokens: int) -> str:
    """The warning for a model with some or all fast weights unchanged."""
    named = ", ".join(unchanged[:NAMED]) + (f" and {len(unchanged) - NAMED} more" if len(unchanged) > NAMED else "")
    if len(unchanged) < count:
        return (
            f"{len(unchanged)} of the {count} fast weights of {spec} did not move in {tokens:,} tokens: {named}. They learn "
            "nothing as it reads. Look for an inner learning rate of zero, or a layer whose new weights do not reach the state."
        )
    return (
        f"{spec} has {count} fast weights and none of them moved in {tokens:,} tokens: it does not learn as it reads. Check "
        "that its inner update runs in eval mode and without gradients, that its inner learning rate is not zero, and that the "
        f"new weights reach the state that it returns ({named})."
    )


def metrics_of(sums: FastWeightSums) -> dict[str, Value]:
    changed, count = int((sums.change > 0).sum()), sums.measurements
    return {
        "fast_weight_change": value_of("fast_weight_change", float(sums.change.mean()) / count, n=count),
        "fast_weight_distance": value_of("fast_weight_distance", float(sums.distance.mean()), n=len(sums.names)),
        "fast_weights_changed": value_of("fast_weights_changed", changed, unit=f"of {len(sums.names)}"),
    }


def series_of(sums: FastWeightSums) -> dict[str, Series]:
    """The change over the text, the mean and, for at most `MOST_CURVES` weights, of each."""
    history = np.array(sums.history)
    read = np.cumsum(history[:, 0]).tolist()
    names = ["fast_weight_change", *(f"fast_weight_change/{name}" for name in sums.names if len(sums.names) <= MOST_CURVES)]
    values = history[:, 2:] / history[:, 1:2]
    return {name: Series(read, y.tolist(), "tokens", "of its norm") for name, y in zip(names, values.T, strict=True)}


def found_in(record: Record) -> FastWeights | None:
    """The fast weights of a record's model; None if it has none."""
    details = record.details
    if "fast_weights" not in details:
        return None
    changed, unchanged = (tuple(details[f"{which}_fast_weights"]) for which in ("changed", "unchanged"))
    change, distance = record.series["fast_weight_change"], record.metrics["fast_weight_distance"]
    return FastWeights(details["fast_weights"], changed, unchanged, change, distance)
