"""Measure what a model needs: bytes of weights, state and activations, operations a token, and use of the machine.

The last test checks the measurement with a model of known allocations.
"""

import pytest
import torch
from torch import nn

from pytest_lmeval import Value
from pytest_lmeval.models._sources import as_model

pytestmark = pytest.mark.benchmark
MIB = 1 << 20


def test_memory(lmeval, lm, seq_len):  # 128 and 512, or what --lmeval-seq-len says
    result = lmeval.memory(lm, seq_len=seq_len)
    assert result.weights_bytes + result.state_bytes + result.activations_bytes < 4 << 30  # the memory that it has to fit in


def test_a_state_that_is_declared_constant_does_not_grow(lmeval, lm):
    short, long = (lmeval.memory(lm, seq_len=length) for length in (512, 1024))
    assert not lm.constant_state or long.state_bytes == short.state_bytes


def test_efficiency(lmeval, lm, benchmark, seq_len):
    lmeval.efficiency(lm, seq_len=seq_len)


class Known(nn.Module):
    """16 MiB of weights, 32 MiB of state; a step holds 64 MiB more for each token, in two pieces."""

    vocab_size = 256

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4 * MIB))

    def forward(self, input_ids, state=None):
        tokens = input_ids.shape[1]
        state = torch.ones(8 * MIB)
        first, second = torch.ones(tokens, 8 * MIB), torch.ones(tokens, 8 * MIB)
        logits = first[:, :1] + second[:, : self.vocab_size]
        return logits[None], state


def test_known_allocations_are_reported_within_two_percent(lmeval):
    """To the byte, and the same in a second run, where torch's own allocations are followed."""
    lm, tokens = as_model(Known()), 8
    result, again = (lmeval.memory(lm, seq_len=tokens) for _ in range(2))
    state, logits = 32 * MIB, tokens * 256 * 4
    peak = state + tokens * 64 * MIB + logits
    assert (result.weights_bytes, result.state_bytes) == (16 * MIB, state)
    assert result.tensors_peak_bytes == again.tensors_peak_bytes == peak
    assert result.activations_bytes == again.activations_bytes == peak - state
    assert result.growth_bytes == pytest.approx(peak, rel=0.02)
    assert again.growth_bytes == pytest.approx(peak, rel=0.02)
    ratios = {"growth_over_known": result.growth_bytes / peak, "growth_between_runs": again.growth_bytes / result.growth_bytes}
    lmeval.record(lm, "known allocations", **{name: Value(ratio, "x") for name, ratio in ratios.items()})
