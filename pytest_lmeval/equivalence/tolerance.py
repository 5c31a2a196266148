"""How far a chunked run may be from a full one: the arithmetic says, not the test.

Both runs are compared with a float64 run of the same rounded weights. A correct model errs about as much in chunks
as in one piece (measured over many models and precisions: 0.7 to 1.4 times as much); a dropped state errs hundreds to
millions of times more. So the chunked run may err 8 times as much (root mean square) or 16 times (largest), plus a
floor of a few roundings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RMS_FACTOR, MAX_FACTOR = 8.0, 16.0
FLOOR = {torch.float64: 1e-5}  # models round to float32 inside (norms, softmax), whatever their weights are
ROUNDINGS = 32


@dataclass(frozen=True)
class Excess:
    """How a run compares: `ratio` of root mean square errors; allowed if `share` of the allowance is at most 1."""

    ratio: float
    share: float
    error: float  # the largest, in nats
    allowed: float
    position: int  # where the largest is


@dataclass(frozen=True)
class Yardstick:
    """The full run of one sequence and its reference, both log-probabilities [t, v] in float64."""

    reference: Tensor
    full_error: Tensor  # [t] nats: error of the full run against the reference
    dtype: torch.dtype

    def measure(self, logits: Tensor, other: Tensor | None = None) -> Excess:
        """Compare a run's logits [t, v] of the same sequence, or of its first t tokens, with the reference or another run."""
        t = logits.shape[0]
        reference, full_error = self.reference[:t], self.full_error[:t]
        if other is not None:
            reference = log_probabilities(other)
        error = token_errors(log_probabilities(logits), reference)
        largest = min(float(reference[reference.isfinite()].abs().max()), 100.0)
        floor = max(ROUNDINGS * torch.finfo(self.dtype).eps, FLOOR.get(self.dtype, 0.0)) * max(1.0, largest)
        rms, full_rms = float(error.square().mean().sqrt()), float(full_error.square().mean().sqrt())
        position = int(error.argmax())
        allowed = MAX_FACTOR * float(full_error.max()) + floor
        share = max(rms / (RMS_FACTOR * full_rms + floor), float(error[position]) / allowed)
        return Excess(rms / max(full_rms, floor / RMS_FACTOR), share, float(error[position]), allowed, position)


def log_probabilities(logits: Tensor) -> Tensor:
    """[t, v] logits to float64 log-probabilities on the CPU."""
    return torch.log_softmax(logits.detach().to("cpu", torch.float64), dim=-1)


def token_errors(run: Tensor, reference: Tensor) -> Tensor:
    """[t] the largest difference over the vocabulary at each token; infinite where one of the two is not finite alone."""
    difference = (run - reference).abs()
    same = (run == reference) | (run.isnan() & reference.isnan())
    return difference.masked_fill(same, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf")).amax(dim=-1)
