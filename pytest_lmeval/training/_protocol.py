"""Define how a model is trained: one value with every setting, so that models differ in nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pytest_lmeval.errors import ProtocolError, nearest

STEPS = 300  # if neither steps nor epochs are given
FLOOR = 0.1  # the fraction of `lr` at which the schedule ends


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings of a training with AdamW (Loshchilov and Hutter, 2019). Raises ProtocolError for invalid ones.

    steps, epochs   length: a number of updates (300), or of passes over the training tokens
    batch_size      crops per update
    seq_len         tokens of a crop that the loss is taken over; each crop is read from an empty state
    tokens          tokens read from the training corpus at most, and from the held-out one
    lr              the highest learning rate; `warmup` is the fraction of the steps in which it rises linearly
    schedule        how it falls from there to a tenth at the last step
    weight_decay    of matrices, not of vectors and scalars
    betas           of AdamW
    clip            the largest norm of all gradients together; None: no clipping
    seed            of the order of crops and of dropout; the initial weights are those of the given model
    eval_every      steps between evaluations on the held-out text, besides one before the first and one after the last step
    eval_tokens     held-out tokens of each evaluation, in crops spread evenly over the held-out text
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 16
    seq_len: int = 128
    tokens: int = 1_000_000
    lr: float = 3e-3
    warmup: float = 0.1
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    seed: int = 0
    eval_every: int = 50
    eval_tokens: int = 16_384

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", STEPS)
        if self.steps is not None and self.epochs is not None:
            raise ProtocolError(f"steps={self.steps} and epochs={self.epochs}: a training has one end. Leave one of them None.")
        for name, (what, holds) in RULES.items():
            value = getattr(self, name)
            if not (holds(value) or (value is None and what.startswith("None"))):
                raise ProtocolError(f"{name}={value!r} in a training protocol; {name} must be {what}.")

    @classmethod
    def of(cls, **settings: Any) -> Protocol:
        """The protocol with these settings. Raises ProtocolError for an unknown name."""
        known = [field.name for field in fields(cls)]
        if wrong := [name for name in settings if name not in known]:
            near = nearest(wrong[0], known)
            raise ProtocolError(f"a training has no setting {', '.join(wrong)}.{near} Its settings are {', '.join(known)}.")
        return cls(**settings)

    def to_json(self) -> dict[str, Any]:
        """Every setting, by name."""
        return {**asdict(self), "betas": list(self.betas)}


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_number(one) and 0 <= one < 1 for one in value)


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("steps", "epochs"), ("None, or a whole number from 1 up", _whole)),
    **dict.fromkeys(("batch_size", "seq_len", "tokens", "eval_every", "eval_tokens"), ("a whole number from 1 up", _whole)),
    "lr": ("a number above 0", lambda value: _number(value) and 0 < value < math.inf),
    "warmup": ("a fraction of the steps, from 0 to below 1", lambda value: _number(value) and 0 <= value < 1),
    "schedule": ("cosine or linear", lambda value: value in ("cosine", "linear")),
    "weight_decay": ("a number from 0 up", lambda value: _number(value) and 0 <= value < math.inf),
    "betas": ("two numbers from 0 to below 1", _pair),
    "clip": ("None, or a number above 0", lambda value: _number(value) and 0 < value < math.inf),
    "seed": ("a whole number from 0 to 2**31 - 1", lambda value: _whole(value, 0) and value < 1 << 31),
}


def learning_rate(protocol: Protocol, step: int, steps: int) -> float:
    """The learning rate of update `step` (counted from 0) of `steps`."""
    rising = math.ceil(protocol.warmup * steps)
    if step < rising:
        return protocol.lr * (step + 1) / rising
    done = (step + 1 - rising) / (steps - rising)
    left = 1 - done if protocol.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return protocol.lr * (FLOOR + (1 - FLOOR) * left)
