"""Counts of operations and of memory equal those by hand."""

import ctypes
import os
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_lmeval.models._flops import FORMULAS, Flops, count_flops, training_flops
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.profiling._peak import CLEAR, peak_memory
from pytest_lmeval.zoo import ZOO

B, T = 2, 5


def flops_of(module, *shape):
    """Operations of a module whose input requires a gradient, as inside a model."""
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
def test_the_count_of_a_layer_equals_one_by_hand(name):
    module, shape, forward, backward = BY_HAND[name]
    assert flops_of(module, *shape) == Flops(forward, backward)


@pytest.mark.parametrize(("kind", "gates"), [(nn.GRU, 3), (nn.RNN, 1)])
def test_the_count_of_a_recurrent_layer_of_matrix_products_equals_one_by_hand(kind, gates):
    forward = 2 * B * T * gates * (7 * 6 + 7 * 7)
    first = 2 * B * gates * 7 * 7  # the state before the first token has no gradient
    assert flops_of(kind(6, 7, batch_first=True), B, T, 6) == Flops(forward, 2 * forward - first)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.data())
def test_the_count_of_attention_does_not_depend_on_the_kernel(b, groups, t, s, kv_heads, data):
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
        assert training_flops(loss) == Flops(2 * product, 4 * product)  # the scores are kept


def test_torch_alone_counts_these_wrongly():
    """The reason for our formulas: if this fails, torch has added one, and ours can go."""
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
def test_work_without_gradients_is_counted(mode):
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
    """On shapes alone, which needs no GPU."""
    shapes = [tuple(weight.shape) for weight in nn.LSTM(6, 7).parameters()]
    fused, fused_backward = FORMULAS[torch.ops.aten._cudnn_rnn], FORMULAS[torch.ops.aten._cudnn_rnn_backward]
    assert fused((T, B, 6), shapes, 4, None) == LSTM
    assert fused_backward((T, B, 6), shapes, 4, None) == 2 * LSTM


ENCODER = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
ATTENTION = nn.MultiheadAttention(16, 2, batch_first=True)
FUSED = {
    "encoder layer": (ENCODER, lambda x: ENCODER(x)),
    "with a mask": (ENCODER, lambda x: ENCODER(x, src_mask=torch.ones(T, T).triu(1).bool())),
    "self-attention": (ATTENTION, lambda x: ATTENTION(x, x, x, need_weights=False)),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_layer_that_is_fused_in_eval_mode_costs_the_same_as_in_training(name):
    module, work = FUSED[name]
    x = torch.randn(B, T, 16)
    in_training = count_flops(lambda: work(x))
    module.eval()
    with torch.no_grad():
        assert count_flops(lambda: work(x)) == in_training > 0
    module.train()


needs_grouped = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped products")


@needs_grouped
def test_each_token_costs_the_matrix_of_its_own_expert():
    tokens, experts = torch.ones(10, 16).bfloat16(), torch.ones(3, 16, 8).bfloat16()
    ends = torch.tensor([3, 6, 10], dtype=torch.int32)
    assert count_flops(lambda: torch._grouped_mm(tokens, experts, offs=ends)) == 2 * 10 * 16 * 8
    gradient = torch.ones(10, 8).bfloat16()
    assert count_flops(lambda: torch._grouped_mm(tokens.mT, gradient, offs=ends)) == 2 * 10 * 16 * 8


def test_the_products_of_quantized_weights_count_by_the_size_of_the_weights():
    x = torch.ones(10, 16).bfloat16()
    packed, scales = torch.ones(8, 16, dtype=torch.int8), torch.ones(8).bfloat16()
    assert count_flops(lambda: torch._weight_int8pack_mm(x, packed, scales)) == 2 * 10 * 16 * 8
    assert count_flops(lambda: torch._int_mm(torch.ones(32, 16).char(), packed.mT)) == 2 * 32 * 16 * 8


def test_counting_changes_no_gradient():
    linear, inputs = nn.Linear(6, 7), torch.randn(B, 6)
    linear(inputs).square().sum().backward()
    expected = linear.weight.grad.clone()
    linear.zero_grad()
    training_flops(lambda: linear(inputs).square().sum())
    assert torch.equal(linear.weight.grad, expected)


# ------------------------------------------------------------------------------------------------------ the zoo


def linear(model):
    """Entries of the matrices that multiply every token."""
    return sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear | nn.Conv1d))


def transformer(model, b, t):
    d = model.embed.embedding_dim
    return 2 * b * t * (linear(model) + model.embed.weight.numel()) + len(model.layers) * 4 * b * t * t * d


def banded(model, b, t, window, block):
    """Queries in blocks, each with the keys in its window."""
    block = min(block, t)
    seen = -(-t // block) * block * (block + window - 1)
    d = model.embed.embedding_dim
    return 2 * b * t * (linear(model) + model.embed.weight.numel()) + len(model.layers) * 4 * b * seen * d


def lstm(model, b, t):
    d = model.embed.embedding_dim
    return 2 * b * t * (len(model.layers) * 8 * d * d + model.embed.weight.numel())


def mamba(model, b, t):
    scan = sum(2 * b * t * layer.a_log.numel() for layer in model.layers)  # y = C h
    return 2 * b * t * (linear(model) + model.embed.weight.numel()) + scan


def mamba2(model, b, t):
    layer = model.layers[0]
    n, d = layer.d_state, layer.heads * layer.headdim
    blocks = [min(layer.block, t - begin) for begin in range(0, t, layer.block)]
    scan = sum(2 * b * (x * x * (n + d) + 2 * x * n * d) for x in blocks)  # C B, and it with x; h read, and written
    return 2 * b * t * (linear(model) + model.embed.weight.numel()) + len(model.layers) * scan


def ttt(model, b, t):
    fast = model.layers[0].fast
    f, heads, size = fast.weight.shape[-1], fast.heads, fast.mini_batch_size
    again = sum(layer.fast.qk.weight.numel() for layer in model.layers)  # once for queries, once for keys
    batches = [min(size, t - begin) for begin in range(0, t, size)]
    learn = sum(2 * b * heads * (4 * x * (f + 1) * f + x * x * (2 * f + 1)) for x in batches)
    return 2 * b * t * (linear(model) + again + model.embed.weight.numel()) + len(model.layers) * learn


def moshi(model, b, t):
    steps = sum(part.weight.numel() for part in model.modules() if type(part).__name__ == "PerStep")
    (heads, context, e), depth = model.ring_shape, model.depth.embed.table.embedding_dim
    attention = len(model.layers) * 4 * b * t * (context + t) * heads * e + len(model.depth.layers) * 4 * b * t * 8 * 8 * depth
    return 2 * b * t * (linear(model) + steps) + attention


def bk(model, b, t):
    return 2 * b * t * linear(model)  # the sweeps are elementwise


OF_THE_ZOO = {
    "zoo:demo": lambda model, b, t: banded(model, b, t, window=256, block=128),
    "zoo:transformer": transformer,
    "zoo:windowed": lambda model, b, t: banded(model, b, t, window=64, block=64),
    "zoo:lstm": lstm,
    "zoo:mamba": mamba,
    "zoo:mamba2": mamba2,
    "zoo:ttt": ttt,
    "zoo:moshi": moshi,
    "zoo:bk": bk,
    "zoo:causal-bk": bk,
}


@pytest.mark.parametrize("spec", OF_THE_ZOO)
def test_the_count_of_a_model_of_the_zoo_equals_one_by_hand(spec):
    lm = load(spec)
    for rows, tokens in [(1, 1), (2, 40), (1, 130)]:
        with torch.no_grad():
            counted = count_flops(lambda: lm.step(lm.random_ids(rows, tokens)))  # noqa: B023 - called at once
        assert counted == OF_THE_ZOO[spec](lm.module, rows, tokens), (rows, tokens)


def test_every_model_of_the_zoo_has_a_count_by_hand():
    assert set(OF_THE_ZOO) == set(ZOO)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_quantized_model_counts_like_the_model_before(bits):
    quantization = pytest.importorskip("torchao.quantization")
    plain, quantized = load("zoo:transformer"), load("zoo:transformer").module
    int4 = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig() if bits == 8 else int4)
    with torch.no_grad():
        found = [count_flops(lambda: lm.step(plain.random_ids(2, 8))) for lm in (plain, as_model(quantized))]  # noqa: B023
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------------------- memory

CPU = torch.device("cpu")
MIB = 1 << 20
can_reset = pytest.mark.skipif(not os.access(CLEAR, os.W_OK), reason="the peak of a process cannot be reset here")


def hold(mebibytes):
    """Allocate and write so much memory, and free it."""
    torch.ones(mebibytes * MIB, dtype=torch.uint8)


PEAK = """
    import pytest, torch
    from pytest_lmeval.profiling._peak import peak_memory

    MIB = 1 << 20

    def hold(mebibytes):
        torch.ones(mebibytes * MIB, dtype=torch.uint8)

    def test_peak():
        hold(240)  # earlier allocations do not count
        with peak_memory(torch.device("cpu")) as peak:
            hold(100)
            hold(200)
        assert peak.growth == pytest.approx(200 * MIB, rel=0.03)
        assert peak.bytes > peak.growth
"""


@can_reset
def test_the_peak_of_a_known_allocation_is_found(pytester):
    """In a process of its own: what threads hold that other tests left in this one would count too."""
    pytester.makepyfile(PEAK)
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


@can_reset
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the allocator keeps what is freed")
def test_memory_that_was_freed_before_counts_when_it_is_reused():
    def hold_many():
        return [torch.ones(MIB // 16, dtype=torch.uint8) for _ in range(16 * 100)]

    last = hold_many()[-1:]  # the last one keeps the allocator from returning the rest to the system
    with peak_memory(CPU) as peak:
        hold_many()
    del last
    assert peak.growth == pytest.approx(100 * MIB, rel=0.05)


@can_reset
def test_a_nested_block_that_fails_takes_nothing_from_the_outer_one():
    with peak_memory(CPU) as outer:
        hold(200)
        with suppress(ZeroDivisionError), peak_memory(CPU) as inner:
            hold(100)
            raise ZeroDivisionError
    assert inner.growth == pytest.approx(100 * MIB, rel=0.03)
    assert outer.growth == pytest.approx(200 * MIB, rel=0.03)


def test_memory_that_cannot_be_measured_is_none(tmp_path):
    for block in (peak_memory(torch.device("meta")), peak_memory(CPU, clear=tmp_path / "no" / "such" / "file")):
        with block as peak:
            pass
        assert (peak.bytes, peak.growth) == (None, None)


def test_a_model_whose_state_holds_a_parameter_is_counted():
    layer = nn.Linear(5, 7, bias=False)

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, inputs):
            return self.layer(inputs), self.layer.weight

    with torch.no_grad():
        assert count_flops(lambda: Holding()(torch.ones(3, 5))) == 2 * 3 * 5 * 7
