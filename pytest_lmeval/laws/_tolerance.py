"""How far a chunked run may be from a full one: the arithmetic says, not the test.

Both runs are compared with a float64 run of the same rounded weights. A correct model errs about as much in chunks
as in one piece (measured over many models and precisions: 0.7 to 1.4 times as much); a dropped state errs hundreds to
millions of times more. So the chunked run may err 8 times as much (root mean square) or 16 times (largest), plus a
floor of a few roundings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RMS_FACTOR, MAX_FACTOR = 8.0, 16.0
FLOOR = {torch.float64: 1e-5}  # models round to float32 inside (norms, softmax), whatever their weights are
ROUNDINGS = 32
COLUMNS = 4096  # of a larger vocabulary, so many entries are compared: a fault shows in all of them


@dataclass(frozen=True)
class Excess:
    """How a run compares with a yardstick.

    ratio     its root mean square error over that of the full run: about 1 where all is well, allowed 8
    share     the part of the allowance that it took: kept if at most 1
    error     the largest error, in nats
    allowed   what `error` may be
    position  the token at which it is
    profile   [t] error of each token over `allowed`
    """

    ratio: float
    share: float
    error: float
    allowed: float
    position: int
    profile: Tensor


@dataclass(frozen=True)
class Yardstick:
    """The full run of one sequence and its reference, both log-probabilities [t, v] in float64."""

    reference: Tensor
    full_error: Tensor  # [t] nats: error of the full run against the reference
    dtype: torch.dtype

    def against(self, other: Tensor) -> Yardstick:
        """The same allowance, to compare with another run's log-probabilities."""
        return replace(self, reference=other)

    def measure(self, run: Tensor) -> Excess:
        """Compare log-probabilities [t, v] of the same sequence, or of its first t tokens, with the reference."""
        reference = self.reference[: run.shape[0]]
        error = token_errors(run, reference)
        finite = reference[reference.isfinite()]
        largest = max(1.0, min(float(finite.abs().max()), 100.0)) if finite.numel() else 100.0
        rounding = torch.finfo(self.dtype).eps * largest
        floor = max(ROUNDINGS * rounding, FLOOR.get(self.dtype, 0.0) * largest)
        rms, full_rms = (math.sqrt(float(e.square().mean())) for e in (error, self.full_error))
        position = int(error.argmax())
        allowed = MAX_FACTOR * float(self.full_error.max()) + floor
        share = max(rms / (RMS_FACTOR * full_rms + floor), float(error[position]) / allowed)
        ratio = rms / max(full_rms, rounding)  # a full run that is no further from its reference than one rounding says little
        return Excess(ratio, share, float(error[position]), allowed, position, error / allowed)


def log_probabilities(logits: Tensor) -> Tensor:
    """[t, v] logits to float64 log-probabilities on the CPU, of an even sample of a large vocabulary."""
    found = torch.log_softmax(logits.detach().to("cpu", torch.float64), dim=-1)
    return found if found.shape[-1] <= 2 * COLUMNS else found[:, :: found.shape[-1] // COLUMNS].clone()


def token_errors(run: Tensor, reference: Tensor) -> Tensor:
    """[t] the largest difference over the vocabulary (and the codebooks) at each place; infinite where one of the two is not
    finite alone."""
    difference = (run - reference).abs()
    same = (run == reference) | (run.isnan() & reference.isnan())
    return difference.masked_fill(same, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf")).flatten(1).amax(dim=-1)
