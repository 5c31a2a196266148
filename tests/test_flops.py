"""Operations and memory are counted: held to modules whose numbers are known by hand."""

import ctypes
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_lmeval.profiling import peak as peaks
from pytest_lmeval.profiling.flops import FORMULAS, Flops, count_flops, training_flops
from pytest_lmeval.profiling.peak import peak_memory

B, T = 2, 5


def flops_of(module, *shape):
    """Of a module whose first input wants a gradient too, as it does inside a model."""
    inputs = torch.randn(*shape, requires_grad=True)

    def loss():
        output = module(inputs)
        return (output[0] if isinstance(output, tuple) else output).sum()

    return training_flops(loss)


LSTM = 2 * B * T * (4 * 7 * 6 + 4 * 7 * 7)
BY_HAND = {  # module, shape of its input, forward, backward
    "linear": (nn.Linear(6, 7), (B, T, 6), 2 * B * T * 6 * 7, 2 * 2 * B * T * 6 * 7),
    "convolution": (nn.Conv1d(6, 8, 3), (B, 6, 10), 2 * B * 8 * 8 * 6 * 3, 2 * 2 * B * 8 * 8 * 6 * 3),
    "grouped": (nn.Conv1d(6, 8, 3, groups=2), (B, 6, 10), 2 * B * 8 * 8 * 3 * 3, 2 * 2 * B * 8 * 8 * 3 * 3),
    "depthwise": (nn.Conv1d(6, 6, 3, groups=6), (B, 6, 10), 2 * B * 8 * 6 * 3, 2 * 2 * B * 8 * 6 * 3),
    "transposed": (nn.ConvTranspose1d(6, 8, 3), (B, 6, 10), 2 * B * 10 * 8 * 6 * 3, 2 * 2 * B * 10 * 8 * 6 * 3),
    "lstm": (nn.LSTM(6, 7, batch_first=True), (B, T, 6), LSTM, 2 * LSTM),
    "lstm, time first": (nn.LSTM(6, 7), (T, B, 6), LSTM, 2 * LSTM),
    "lstm, no bias": (nn.LSTM(6, 7, bias=False, batch_first=True), (B, T, 6), LSTM, 2 * LSTM),
    "two layers": (
        nn.LSTM(6, 7, num_layers=2, batch_first=True),
        (B, T, 6),
        LSTM + 2 * B * T * 2 * 4 * 7 * 7,
        2 * (LSTM + 2 * B * T * 2 * 4 * 7 * 7),
    ),
    "both ways": (nn.LSTM(6, 7, bidirectional=True, batch_first=True), (B, T, 6), 2 * LSTM, 2 * 2 * LSTM),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_layer_costs_what_it_costs_by_hand(name):
    module, shape, forward, backward = BY_HAND[name]
    assert flops_of(module, *shape) == Flops(forward, backward)


@pytest.mark.parametrize(("kind", "gates"), [(nn.GRU, 3), (nn.RNN, 1)])
def test_a_recurrent_layer_made_of_matrix_products_costs_what_it_costs_by_hand(kind, gates):
    forward = 2 * B * T * gates * (7 * 6 + 7 * 7)
    first = 2 * B * gates * 7 * 7  # the state before the first token is no variable: nothing goes back into it
    assert flops_of(kind(6, 7, batch_first=True), B, T, 6) == Flops(forward, 2 * forward - first)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.data())
def test_attention_costs_the_same_whatever_kernel_computes_it(b, groups, t, s, kv_heads, data):
    heads, e = groups * kv_heads, 8
    q = torch.randn(b, heads, t, e, requires_grad=True)
    k, v = (torch.randn(b, kv_heads, s, e, requires_grad=True) for _ in range(2))
    options = {"enable_gqa": groups > 1}
    if data.draw(st.booleans()):
        options["attn_mask"] = torch.randn(data.draw(st.sampled_from([(t, s), (b, 1, t, s), (1, heads, t, s)])))
    elif data.draw(st.booleans()):
        options["is_causal"] = True

    def loss():
        return F.scaled_dot_product_attention(q, k, v, **options).sum()

    product = 2 * b * heads * t * s * e  # q with k, or the weights with v
    assert training_flops(loss) == Flops(2 * product, 5 * product)  # backward: scores again, and four gradients
    with sdpa_kernel(SDPBackend.MATH):
        assert training_flops(loss) == Flops(2 * product, 4 * product)  # kept, so not computed again


def test_torch_alone_does_not_know_these():
    """The reason for our formulas: where this fails, torch has learned one, and ours can go."""
    q = torch.randn(1, 2, 4, 8)
    lstm, depthwise = nn.LSTM(6, 7), nn.Conv1d(6, 6, 3, groups=6)
    inputs = torch.randn(B, 6, 10, requires_grad=True)

    def alone(work):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    assert alone(lambda: F.scaled_dot_product_attention(q, q, q)) == 0
    assert alone(lambda: lstm(torch.randn(T, B, 6))) == 0
    assert alone(lambda: torch.ones(3, 5) @ torch.ones(5)) == 0
    forward = 2 * B * 8 * 6 * 3
    assert alone(lambda: depthwise(inputs).sum().backward()) == forward + forward + 6 * forward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_work_without_gradients_is_counted_too(mode):
    q, lstm, linear = torch.randn(1, 2, 4, 8), nn.LSTM(6, 7), nn.Linear(6, 7)
    with mode():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 4 * 2 * 4 * 4 * 8
        assert count_flops(lambda: lstm(torch.randn(T, B, 6))) == LSTM
        assert count_flops(lambda: linear(torch.randn(B, T, 6))) == 2 * B * T * 6 * 7


def test_vector_products_are_counted_and_elementwise_work_is_not():
    matrix, vector = torch.randn(3, 5), torch.randn(5)
    assert count_flops(lambda: matrix @ vector) == 2 * 3 * 5
    assert count_flops(lambda: torch.addmv(torch.zeros(3), matrix, vector)) == 2 * 3 * 5
    assert count_flops(lambda: vector @ vector) == 2 * 5
    assert count_flops(lambda: (matrix * 2 + 1).softmax(-1).cumsum(0)) == 0


def test_the_formula_of_cudnn_agrees_with_that_of_onednn():
    """On shapes alone: this runs where there is no GPU."""
    shapes = [tuple(weight.shape) for weight in nn.LSTM(6, 7).parameters()]
    fused, fused_backward = FORMULAS[torch.ops.aten._cudnn_rnn], FORMULAS[torch.ops.aten._cudnn_rnn_backward]
    assert fused((T, B, 6), shapes, 4, None) == LSTM
    assert fused_backward((T, B, 6), shapes, 4, None) == 2 * LSTM


def test_counting_changes_no_gradient():
    linear, inputs = nn.Linear(6, 7), torch.randn(B, 6)
    linear(inputs).square().sum().backward()
    expected = linear.weight.grad.clone()
    linear.zero_grad()
    training_flops(lambda: linear(inputs).square().sum())
    assert torch.equal(linear.weight.grad, expected)


# --------------------------------------------------------------------------------------------------- memory

CPU = torch.device("cpu")
MIB = 1 << 20
can_reset = pytest.mark.skipif(not os.access(peaks.CLEAR, os.W_OK), reason="the peak of a process cannot be reset here")


def hold(mebibytes):
    """Write to so much memory, and let it go."""
    torch.ones(mebibytes * MIB, dtype=torch.uint8)


@can_reset
def test_the_peak_of_a_known_allocation():
    hold(300)  # what was held before is not the block's
    with peak_memory(CPU) as peak:
        hold(100)
        hold(200)
    assert peak.growth == pytest.approx(200 * MIB, rel=0.03)
    assert peak.bytes > peak.growth


@can_reset
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the allocator keeps what is freed")
def test_memory_that_was_used_and_freed_before_is_counted_when_it_is_used_again():
    def hold_many():
        return [torch.ones(MIB // 16, dtype=torch.uint8) for _ in range(16 * 100)]

    last = hold_many()[-1:]  # what lies behind the rest keeps the allocator from giving it back by itself
    with peak_memory(CPU) as peak:
        hold_many()
    del last
    assert peak.growth == pytest.approx(100 * MIB, rel=0.05)


@can_reset
def test_a_block_inside_a_block_takes_nothing_from_it():
    with peak_memory(CPU) as outer:
        hold(200)
        with peak_memory(CPU) as inner:
            hold(100)
    assert inner.growth == pytest.approx(100 * MIB, rel=0.03)
    assert outer.growth == pytest.approx(200 * MIB, rel=0.03)


@can_reset
def test_work_that_fails_leaves_nothing_open():
    with pytest.raises(ZeroDivisionError), peak_memory(CPU):
        raise ZeroDivisionError
    assert peaks._open == []


def test_what_cannot_be_measured_is_not_zero(monkeypatch, tmp_path):
    with peak_memory(torch.device("meta")) as peak:
        pass
    assert (peak.bytes, peak.growth) == (None, None)
    monkeypatch.setattr(peaks, "CLEAR", tmp_path / "no" / "such" / "file")
    with peak_memory(CPU) as peak:
        pass
    assert (peak.bytes, peak.growth) == (None, None)


def test_a_state_that_holds_a_parameter_is_counted_like_any_other():
    layer = nn.Linear(5, 7, bias=False)

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, inputs):
            return self.layer(inputs), self.layer.weight

    with torch.no_grad():
        assert count_flops(lambda: Holding()(torch.ones(3, 5))) == 2 * 3 * 5 * 7
