"""Measure how far a run is from its reference, and how far the arithmetic allows it to be.

A correct model errs in chunks 0.7 to 1.4 times as much as in one call (measured over many models and precisions), a dropped
state hundreds to millions of times more. So the chunked run may err 8 times as much (root mean square) or 16 times (largest),
plus a few roundings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RMS_FACTOR, MAX_FACTOR = 8.0, 16.0
FLOOR = {torch.float64: 1e-5}  # models round to float32 inside (norms, softmax), whatever their weights are
ROUNDINGS = 32
COLUMNS = 4096  # entries compared of a larger vocabulary: a fault shows in all of them


@dataclass(frozen=True)
class Excess:
    """The error of a run against its reference.

    ratio            its root mean square error over that of the full run: about 1 if the model is right, allowed 8
    tolerance_ratio  its error over the allowed one: the law is kept up to 1
    error            the largest error, in nats
    allowed          the largest `error` allowed
    position         the token of the largest error
    profile          [t] error of each token over `allowed`
    """

    ratio: float
    tolerance_ratio: float
    error: float
    allowed: float
    position: int
    profile: Tensor

    def __str__(self) -> str:
        return f"off by {self.error:.3g} nats at token {self.position}, allowed {self.allowed:.2g}"


@dataclass(frozen=True)
class Reference:
    """Expected log-probabilities [t, v] of one sequence, in float64, and the error [t] of its full run, in nats."""

    expected: Tensor
    full_error: Tensor
    dtype: torch.dtype

    def measure(self, run: Tensor) -> Excess:
        """Compare log-probabilities [t, v] of the sequence, or of its first t tokens, with the expected ones."""
        expected = self.expected[: run.shape[0]]
        error = token_errors(run, expected)
        finite = expected[expected.isfinite()]
        largest = max(1.0, min(float(finite.abs().max()), 100.0)) if finite.numel() else 100.0
        rounding = torch.finfo(self.dtype).eps * largest
        floor = max(ROUNDINGS * rounding, FLOOR.get(self.dtype, 0.0) * largest)
        rms, full_rms = (math.sqrt(float(e.square().mean())) for e in (error, self.full_error))
        position = int(error.argmax())
        allowed = MAX_FACTOR * float(self.full_error.max()) + floor
        tolerance_ratio = max(rms / (RMS_FACTOR * full_rms + floor), float(error[position]) / allowed)
        ratio = rms / max(full_rms, rounding)  # a full run within one rounding of its reference makes a ratio meaningless
        return Excess(ratio, tolerance_ratio, float(error[position]), allowed, position, error / allowed)


def log_probabilities(logits: Tensor) -> Tensor:
    """[t, v] logits to float64 log-probabilities on the CPU; of a large vocabulary, an even sample."""
    return sampled(torch.log_softmax(logits.detach().to("cpu", torch.float64), dim=-1))


def sampled(found: Tensor) -> Tensor:
    """Of a large vocabulary [t, v], an even sample of the columns."""
    return found if found.shape[-1] <= 2 * COLUMNS else found[..., :: found.shape[-1] // COLUMNS].clone()


def token_errors(run: Tensor, expected: Tensor) -> Tensor:
    """[t] the largest difference of each token, over vocabulary and codebooks; infinite where only one of the two is finite."""
    difference = (run - expected).abs()
    same = (run == expected) | (run.isnan() & expected.isnan())
    return difference.masked_fill(same, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf")).flatten(1).amax(dim=-1)
