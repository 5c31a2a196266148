"""Fast weights while a text is read: whether a model that is meant to learn as it reads does so, and how much.

A model with fast weights (test-time training, and other rules that change weights as they read) names them in a method
`fast_weights(state) -> {name: tensor}`; of the state None, those before the first token. After every chunk (of 512 tokens at
least) it is measured how far each has moved since the chunk before, and how far it is from its beginning:

    change = |after - before| / max(|after|, |before|)        0: not at all; 1: from nothing; at most 2

in Frobenius norms. The larger of the two stands below since fast weights often begin at zero, where a change relative to the
weights before it would be no number.
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
from pytest_lmeval.scoring._loss_accumulator import EACH, LossAccumulator, Moves

STRETCH = 512  # tokens: smaller chunks are taken together, so that looking costs less than two percent of reading
NAMED = 8  # weights that a warning names


@dataclass(frozen=True)
class FastWeights:
    """What became of a model's fast weights while it read.

    count     how many tensors they are
    moved, unmoved   their names
    change    mean relative change a chunk (of 512 tokens at least), by tokens read
    distance  mean relative distance from their initial values at the end
    """

    count: int
    moved: tuple[str, ...]
    unmoved: tuple[str, ...]
    change: Series
    distance: Value


class Watch:
    """Compares the fast weights after each chunk with those before it, on the model's device.

    A step may use its state up, so what is kept to compare with are copies. What it finds goes to `LossAccumulator.moves`.
    """

    def __init__(self, lm: Model, reading: LossAccumulator, initial: dict[str, Tensor]) -> None:
        self.lm, self.names = lm, list(initial)
        self.initial = self.before = copies(initial)
        self.sequence = (len(reading.documents), reading.window)
        self.tokens, self.chunks = reading.tokens, reading.chunks_seen
        if reading.moves is None:
            reading.moves = Moves(tuple(initial), np.zeros(len(initial)), np.zeros(len(initial)))
        if reading.state is not None:
            self.before = self._after(reading.state)

    def look(self, reading: LossAccumulator, *, last: bool = False) -> bool:
        """Measure what moved until now, unless that was less than `STRETCH` tokens and is not the `last` of the text.

        Returns whether nothing is left to be measured. Raises NotFiniteError for a fast weight that is no number.
        """
        assert reading.moves is not None
        tokens = reading.tokens - self.tokens
        pending = reading.chunks_seen > self.chunks
        if not pending or (tokens < STRETCH and not last):
            return not pending
        now = self._after(reading.state)
        if (sequence := (len(reading.documents), reading.window)) != self.sequence:
            self.before, self.sequence = self.initial, sequence
        found = torch.stack([relative(now, self.before), relative(now, self.initial)]).tolist()
        change, distance = np.array(found, dtype=np.float64)
        self._check_finite(change + distance, reading)
        reading.moves.add(tokens, change, distance)
        self.before, self.tokens, self.chunks = now, reading.tokens, reading.chunks_seen
        return True

    def _after(self, state: State) -> Weights:
        assert self.lm.fast_weights is not None
        with torch.no_grad():
            found = self.lm.fast_weights(state)
        if list(found) != self.names:
            raise ModelError(
                f"{self.lm.spec} named the fast weights {', '.join(self.names)} before it read, and afterwards "
                f"{', '.join(found) or 'none'}. How far they move cannot be followed: fast_weights(state) has to name the same "
                "ones always."
            )
        return copies(found)

    def _check_finite(self, moved: np.ndarray, reading: LossAccumulator) -> None:
        if not np.isfinite(moved).all():
            name = self.names[int(np.flatnonzero(~np.isfinite(moved))[0])]
            raise NotFiniteError(
                f"the fast weight {name} of {self.lm.spec} is not finite after token {reading.scored} of the stream. It learns "
                "too fast to be stable on this text; what it says from here on means nothing. Lower its inner learning rate."
            )


@dataclass(frozen=True)
class Weights:
    """Copies of the fast weights, in float32 at least, and their norms [n]."""

    tensors: list[Tensor]
    norms: Tensor


def watch(lm: Model, reading: LossAccumulator) -> Watch | None:
    """A watch over the fast weights of `lm`, from here on; None if it has none. Raises ModelError for what is no dict of
    tensors."""
    if lm.fast_weights is None:
        return None
    with torch.no_grad():
        initial: Any = lm.fast_weights(None)
    if not isinstance(initial, dict) or not all(isinstance(x, Tensor) for x in initial.values()):
        raise ModelError(
            f"{lm.spec}: fast_weights(None) returned {type(initial).__name__}; expected a dict from names to tensors, the fast "
            "weights as they are before the first token. Without those, how far they move cannot be said."
        )
    return Watch(lm, reading, initial) if initial else None


def copies(weights: dict[str, Tensor]) -> Weights:
    tensors = [x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in weights.values()]
    return Weights(tensors, norms(tensors))


def norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(x).to(tensors[0].device) for x in tensors])


def relative(now: Weights, before: Weights) -> Tensor:
    """How far each is from before, relative to the larger of its two norms, [n]."""
    moved = norms([x - y for x, y in zip(now.tensors, before.tensors, strict=True)])
    return moved / torch.maximum(now.norms, before.norms).clamp(min=torch.finfo(moved.dtype).tiny)


def details_of(moves: Moves, lm: Model, tokens: int) -> dict[str, Any]:
    """What a record says of the fast weights beside the figures."""
    still = [name for name, total in zip(moves.names, moves.total, strict=True) if not total]
    moved = [name for name in moves.names if name not in set(still)]
    found = {"fast_weights": len(moves.names), "fast_weights_moved": moved, "fast_weights_unmoved": still}
    return {**found, "warnings": [warning(lm.spec, len(moves.names), still, tokens)]} if still else found


def warning(spec: str, count: int, still: Sequence[str], tokens: int) -> str:
    """What is said of a model whose fast weights, some or all, stay where they were."""
    named = ", ".join(still[:NAMED]) + (f" and {len(still) - NAMED} more" if len(still) > NAMED else "")
    if len(still) < count:
        return (
            f"{len(still)} of the {count} fast weights of {spec} did not move in {tokens:,} tokens: {named}. They learn "
            "nothing as it reads. Look for an inner learning rate of zero, or a layer whose new weights do not reach the state."
        )
    return (
        f"{spec} has {count} fast weights and none of them moved in {tokens:,} tokens: it does not learn as it reads. Look "
        "whether its inner update runs in eval mode and without gradients, whether its inner learning rate is zero, and "
        f"whether the new weights reach the state that it returns ({named})."
    )


def metrics_of(moves: Moves) -> dict[str, Value]:
    moving = int((moves.total > 0).sum())
    return {
        "fast_weight_change": value_of("fast_weight_change", float(moves.total.mean()) / moves.stretches, n=moves.stretches),
        "fast_weight_distance": value_of("fast_weight_distance", float(moves.distance.mean()), n=len(moves.names)),
        "fast_weights_moving": value_of("fast_weights_moving", moving, unit=f"of {len(moves.names)}"),
    }


def series_of(moves: Moves) -> dict[str, Series]:
    """The change over the text, of all and, if they are not too many, of each."""
    course = np.array(moves.course)
    read = np.cumsum(course[:, 0]).tolist()
    names = ["fast_weight_change", *(f"fast_weight_change/{name}" for name in moves.names if len(moves.names) <= EACH)]
    values = course[:, 2:] / course[:, 1:2]
    return {name: Series(read, y.tolist(), "tokens", "of its norm") for name, y in zip(names, values.T, strict=True)}


def found_in(record: Record) -> FastWeights | None:
    """What a record of a reading says of the model's fast weights; None if it has none."""
    if "fast_weights" not in record.details:
        return None
    moved, unmoved = (tuple(record.details[f"fast_weights_{name}"]) for name in ("moved", "unmoved"))
    return FastWeights(
        record.details["fast_weights"],
        moved,
        unmoved,
        record.series["fast_weight_change"],
        record.metrics["fast_weight_distance"],
    )
