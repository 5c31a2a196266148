"""The reference models: chunks give the logits and gradients of one pass, and each layer computes what its paper says."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch.nn import functional as F

from pytest_lmeval import registry
from pytest_lmeval.laws._probe import probe
from pytest_lmeval.models._flops import training_flops
from pytest_lmeval.models._model import fork, state_bytes, state_dtypes
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.zoo import _mamba
from pytest_lmeval.zoo._bk import LAPLACIAN, ResNetBK, both_ways, sweep
from pytest_lmeval.zoo._demo import WEIGHTS, Demo, banded_attention
from pytest_lmeval.zoo._lstm import LSTM
from pytest_lmeval.zoo._mamba import Mamba, selective_scan
from pytest_lmeval.zoo._mamba2 import Mamba2
from pytest_lmeval.zoo._transformer import LayerState, Transformer
from pytest_lmeval.zoo._ttt import TTT

SMALL = {
    "transformer": lambda: Transformer(width=16, layers=2, heads=2, hidden=16),
    "windowed": lambda: Transformer(width=16, layers=2, heads=2, hidden=16, window=5),
    "demo": lambda: Demo(width=16, layers=2, heads=2, window=9, kernel=3, hidden=16),
    "lstm": lambda: LSTM(width=16, layers=2),
    "mamba": lambda: Mamba(width=16, layers=2, d_state=4),
    "mamba2": lambda: Mamba2(width=16, layers=2, d_state=4, headdim=8, block=6),
    "ttt": lambda: TTT(width=16, layers=2, heads=2, mini_batch_size=4),
    "causal-bk": lambda: ResNetBK(width=16, layers=2, hidden=16),
}
EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}

causal = pytest.mark.parametrize("name", SMALL)
lengths = st.lists(st.just(1) | st.integers(1, 40), min_size=2, max_size=6)


def thorough(*values):
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def small(name, dtype=torch.float64):
    """The small model, without parameters that are zero or one: their terms would be missing unnoticed."""

    def noisy():
        model = SMALL[name]()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        return model

    return seeded(noisy).to(dtype)


def ids(rows, length, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model, tokens, sizes, damage=lambda layer: layer):
    """Logits [b, t, v] of tokens [b, t] in chunks, with `damage` done to the state of each layer at each boundary."""
    state, parts = None, []
    for chunk in torch.split(tokens, sizes, dim=1):
        logits, state = model(chunk, state)
        parts.append(logits)
        state = [damage(layer) for layer in state]
    return torch.cat(parts, dim=1)


def close(found, expected, within):
    torch.testing.assert_close(found, expected, rtol=0, atol=within)


def assert_chunks_equal_one_pass(model, sizes, within, **damage):
    tokens = ids(2, sum(sizes))
    with torch.no_grad():
        close(read(model, tokens, sizes, **damage), model(tokens)[0], within)


@causal
@pytest.mark.parametrize("dtype", [torch.float64, *thorough(torch.float32)], ids=str)
def test_chunks_give_the_logits_of_one_pass(name, dtype):
    model = small(name, dtype)

    @settings(max_examples=8)
    @given(lengths)
    @example([1] * 40)
    @example([3] * 20)
    @example([64, 65])
    def holds(sizes):
        assert_chunks_equal_one_pass(model, sizes, EXACT[dtype])

    holds()


def zeroed(*names):
    return lambda layer: layer._replace(**{name: torch.zeros_like(getattr(layer, name)) for name in names})


def one_key_short(layer):
    return layer._replace(keys=layer.keys[:, :, 1:], values=layer.values[:, :, 1:])


DAMAGES = {
    "transformer": (one_key_short, zeroed("keys")),
    "windowed": (one_key_short, zeroed("values")),
    "lstm": (zeroed("cell"), zeroed("hidden")),
    "mamba": (zeroed("tail"), zeroed("hidden")),
    "mamba2": (zeroed("tail"), zeroed("hidden")),
    "causal-bk": (torch.zeros_like, torch.conj_physical),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_changes_the_logits(name):
    for damage, (dtype, within) in itertools.product(DAMAGES[name], EXACT.items()):
        with pytest.raises(AssertionError, match="not close"):
            assert_chunks_equal_one_pass(small(name, dtype), [9, 5], 10 * within, damage=damage)


def gradient(model, sizes, **damage):
    """[all parameters] of the loss of a text that is read in chunks."""
    tokens = ids(2, sum(sizes) + 1)
    logits = read(model, tokens[:, :-1], sizes, **damage)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in gradients])


def detached(layer):
    if isinstance(layer, tuple):
        return type(layer)(*map(detached, layer))
    return layer.detach() if isinstance(layer, torch.Tensor) else layer


@causal
def test_the_gradient_of_a_chunk_is_that_of_its_steps(name):
    model = small(name)
    whole = gradient(model, [29])
    for sizes in ([1] * 29, [7, 22]):
        close(gradient(model, sizes), whole, 1e-10)
        with pytest.raises(AssertionError, match="not close"):
            close(gradient(model, sizes, damage=detached), whole, 1e-8)


@pytest.mark.parametrize("name", ["transformer", "lstm", *thorough(*sorted({*SMALL, "bk"} - {"transformer", "lstm"}))])
def test_a_model_learns_a_short_text(name):
    model = seeded(SMALL.get(name, lambda: ResNetBK(width=16, layers=2, hidden=16, causal=False)))
    text = torch.tensor(list(b"A state that is lost at a boundary is lost for good. " * 4)).view(4, -1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-2), []
    for _ in range(40):
        output = model(text[:, :-1])
        logits = output if name == "bk" else output[0]
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@causal
def test_only_the_state_of_full_attention_grows_and_no_state_keeps_its_chunk_in_memory(name):
    model, state, sizes = small(name), None, []
    with torch.no_grad():
        for length in (5, 1, 300, 70):
            _, state = model(ids(1, length), state)
            sizes.append(state_bytes(state))
    if name == "transformer":
        assert [size / sizes[0] for size in sizes] == [1, 6 / 5, 306 / 5, 376 / 5]
    else:
        assert len(set(sizes)) == 1
    assert getattr(model, "constant_state", True) == (name != "transformer")
    before = fork(state)
    for length in (1, 8):
        model(ids(1, length), state)
    torch.testing.assert_close(before, state, rtol=0, atol=0)  # a step does not change the state that it is given


def test_the_position_in_a_text_does_not_matter_to_a_windowed_model():
    model, text = small("windowed", torch.float32), ids(1, 60)
    visible = 2 * (5 - 1)  # tokens before, through two layers
    with torch.no_grad():
        early = model(text)[0][:, visible:]
        late = model(torch.cat([ids(1, 5_000, seed=1), text], dim=1))[0][:, -60 + visible :]
    close(late, early, 1e-5)


@pytest.mark.parametrize("name", sorted({*SMALL, "bk"} - {"demo"}))
def test_loading_is_repeatable_and_draws_no_global_random_numbers(name):
    build = registry.find("models", f"zoo:{name}")
    before = torch.get_rng_state()
    model, again = build(), build()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert not model.training
    assert 600_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_200_000


@pytest.mark.parametrize("name", ["transformer", "lstm", *thorough(*sorted(set(SMALL) - {"transformer", "lstm"}))])
@pytest.mark.parametrize("dtype", [torch.float32, *thorough(torch.bfloat16)], ids=str)
def test_the_probe_finds_a_reference_model_exact(name, dtype):
    result = probe(as_model(small(name, dtype)), budget=1000)
    assert result.verdict == ("exact-any-chunk" if dtype == torch.float32 else "consistent"), result


def test_bk_as_published_is_stateless_and_not_causal_and_refuses_longer_texts():
    lm = as_model(seeded(lambda: ResNetBK(width=16, layers=2, hidden=16, causal=False, context_length=64)))
    assert (lm.stateful, lm.context_length) == (False, 64)
    assert probe(lm, budget=1000).verdict == "non-causal"
    with pytest.raises(ValueError, match="given 65 tokens and has learned 64 positions"):
        lm.step(ids(2, 65))


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", ["", "@bf16"])
@causal
def test_the_probe_finds_a_registered_model_exact(name, suffix):
    result = probe(load(f"{'' if name == 'demo' else 'zoo:'}{name}{suffix}"), budget=1000)
    assert result.verdict == ("consistent" if suffix else "exact-any-chunk"), result


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", ["", "@bf16"])
def test_bk_as_registered_is_not_causal(suffix):
    lm = load(f"zoo:bk{suffix}")
    assert (lm.stateful, lm.context_length) == (False, 1024)
    assert probe(lm, budget=1000).verdict == "non-causal"


# ------------------------------------------------------------------------------------------ demo


def test_the_demo_is_at_most_two_megabytes_and_has_learned_english():
    assert WEIGHTS.stat().st_size <= 2_000_000
    text = torch.tensor(list(b"Return the value of the argument if it is not None, otherwise return the default."))
    with torch.no_grad():
        logits, _ = load("demo").step(text[None, :-1])
    assert F.cross_entropy(logits[0], text[1:]).item() < 2.5 * 0.693  # bits per byte, in nats


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 16), st.integers(0, 11))
def test_attention_in_blocks_equals_dense_attention_in_a_band(t, window, block, seen):
    seen = min(seen, window - 1)
    torch.manual_seed(t)
    q = torch.randn(1, 2, t, 4, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, window - 1 + t, 4, dtype=torch.float64).unbind(0)
    ages = torch.arange(t)[:, None] + window - 1 - torch.arange(window - 1 + t)
    visible = (ages >= 0) & (ages < window) & (torch.arange(window - 1 + t) >= window - 1 - seen)
    slopes = torch.tensor([0.25, 0.0625], dtype=torch.float64)[:, None, None]
    scores = 2 * q @ k.transpose(-1, -2) - slopes * ages
    expected = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
    close(banded_attention(q, k, v, window, seen, block), expected, 1e-10)


# --------------------------------------- the papers, token by token or with dense matrices


def rotated(x, position):
    """[..., e] x rotated as at one position, with pairs as complex numbers."""
    first, second = x.chunk(2, dim=-1)
    angles = position / 10_000 ** (torch.arange(x.shape[-1] // 2) / (x.shape[-1] // 2)).double()
    pairs = torch.complex(first, second) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@settings(max_examples=5)
@given(sizes=lengths)
def test_attention_equals_a_dense_matrix_product(window, sizes):
    layer = seeded(lambda: Transformer(width=16, layers=1, heads=2, window=window)).double().layers[0]
    t = sum(sizes)
    q, k, v = torch.randn(3, 2, 2, t, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(t)).unbind(0)
    state, parts = LayerState(k[:, :, :0], v[:, :, :0]), []
    for chunk in zip(*(torch.split(x, sizes, dim=2) for x in (q, k, v)), strict=True):
        mixed, state = layer.attend(*chunk, state)
        parts.append(mixed)
    far_q, far_k = (torch.stack([rotated(x[:, :, i], 1000 + i) for i in range(t)], dim=2) for x in (q, k))
    age = torch.arange(t)[:, None] - torch.arange(t)
    scores = (far_q @ far_k.mT / 8**0.5).masked_fill((age < 0) | (age >= (window or t)), float("-inf"))
    close(torch.cat(parts, dim=2), scores.softmax(-1) @ v, 1e-10)


def test_an_lstm_layer_computes_its_equations():
    layer, x = small("lstm").layers[0], torch.randn(2, 11, 16, dtype=torch.float64)
    cell, hidden, expected = torch.zeros(2, 16).double(), torch.zeros(2, 16).double(), []
    (inward, recurrent, bias, bias_too), norm = layer.lstm.parameters(), layer.norm(x)
    for i in range(11):
        into, kept, new, out = (norm[:, i] @ inward.T + hidden @ recurrent.T + bias + bias_too).chunk(4, dim=-1)
        cell = kept.sigmoid() * cell + into.sigmoid() * new.tanh()
        hidden = out.sigmoid() * cell.tanh()
        expected.append(x[:, i] + hidden)
    close(layer(x, None)[0], torch.stack(expected, 1), 1e-10)


def convolved(conv, u, i):
    """[b, channels] output of the causal convolution and the SiLU at token i of u [b, t, channels]."""
    kernel = conv.weight.shape[-1]
    taps = [conv.weight[:, 0, kernel - 1 - lag] * u[:, i - lag] for lag in range(min(kernel, i + 1))]
    return F.silu(conv.bias + sum(taps))


def mamba_by_token(layer, x):
    u, z = layer.in_proj(layer.norm(x)).chunk(2, dim=-1)
    h, outputs = 0.0, []
    for i in range(x.shape[1]):
        ui = convolved(layer.conv, u, i)
        dt, b, c = layer.x_proj(ui).split([layer.rank, 4, 4], dim=-1)
        dt = F.softplus(layer.dt_proj(dt))
        h = torch.exp(dt[:, None] * -layer.a_log.exp()) * h + torch.einsum("bd,bn,bd->bnd", dt, b, ui)
        y = torch.einsum("bnd,bn->bd", h, c) + layer.skip * ui
        outputs.append(x[:, i] + layer.out_proj(y * F.silu(z[:, i])))
    return torch.stack(outputs, dim=1)


def mamba2_by_token(layer, x):
    z, u, dts = layer.in_proj(layer.norm(x)).split([32, 40, 4], dim=-1)
    h, outputs = 0.0, []
    for i in range(x.shape[1]):
        ui, b, c = convolved(layer.conv, u, i).split([32, 4, 4], dim=-1)
        ui, dt = ui.unflatten(-1, (4, 8)), F.softplus(dts[:, i] + layer.dt_bias)
        h = torch.exp(-dt * layer.a_log.exp())[..., None, None] * h + torch.einsum("bh,bhp,bn->bhpn", dt, ui, b)
        y = (torch.einsum("bhpn,bn->bhp", h, c) + layer.skip[:, None] * ui).flatten(-2)
        outputs.append(x[:, i] + layer.out_proj(layer.norm_out(y * F.silu(z[:, i]))))
    return torch.stack(outputs, dim=1)


BY_TOKEN = {"mamba": mamba_by_token, "mamba2": mamba2_by_token}


@pytest.mark.parametrize("name", BY_TOKEN)
@settings(max_examples=6)
@given(rows=st.integers(1, 4), t=st.integers(1, 70))
def test_a_state_space_layer_equals_its_recurrence(name, rows, t):
    layer, x = small(name).layers[0], torch.randn(rows, t, 16, dtype=torch.float64)
    with torch.no_grad():
        close(layer(x, None)[0], BY_TOKEN[name](layer, x), 1e-10)


def scan_by_token(u, dt, a, b_in, c_out, hidden):
    outputs = []
    for i in range(u.shape[1]):
        kept, drive = torch.exp(dt[:, i, None] * a), (dt * u)[:, i, None] * b_in[:, i, :, None]
        hidden = kept * hidden + drive
        outputs.append((c_out[:, i, :, None] * hidden).sum(1))
    return torch.stack(outputs, dim=1), hidden


def gradients_of_scan(scan, inputs, by_y, by_hidden):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y, hidden = scan(*inputs)
    return torch.autograd.grad((y * by_y).sum() + (hidden * by_hidden).sum(), inputs)


def scan_inputs(rows, t, n, d, dtype, largest=0.1):
    noise = torch.Generator().manual_seed(t)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=noise)

    dt = largest * torch.where(normal(rows, t, d) > 1, 0.0, normal(rows, t, d).abs())  # some tokens forget nothing
    inputs = [normal(rows, t, d), dt, -normal(n, d).exp(), normal(rows, t, n), normal(rows, t, n), normal(rows, n, d)]
    return [x.to(dtype) for x in (*inputs, normal(rows, t, d), normal(rows, n, d))]


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the largest number; numba compiles the scan in 32 bits


def assert_scans_as_by_token(rows, t, block, largest, dtype):
    n, d = 3, 37
    *inputs, by_y, by_hidden = scan_inputs(rows, t, n, d, dtype, largest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_mamba, "STATES_AT_ONCE", block * rows * n * d)
        found = *selective_scan(*inputs), *gradients_of_scan(selective_scan, inputs, by_y, by_hidden)
    inputs, by_y, by_hidden = [x.double() for x in inputs], by_y.double(), by_hidden.double()
    expected = *scan_by_token(*inputs), *gradients_of_scan(scan_by_token, inputs, by_y, by_hidden)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=0.0, atol=TOLERANCES[dtype] * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@settings(max_examples=25)
@given(rows=st.integers(1, 4), t=st.integers(1, 40), block=st.integers(1, 12), largest=st.sampled_from([0.1, 5.0, 1e4]))
def test_the_scan_in_blocks_and_its_gradients_are_those_token_by_token(dtype, rows, t, block, largest):
    assert_scans_as_by_token(rows, t, block, largest, dtype)


def test_a_scan_that_loses_its_state_between_blocks_is_found(monkeypatch):
    advance = _mamba.advance
    monkeypatch.setattr(_mamba, "advance", lambda *inputs: 0.0 * advance(*inputs))
    with pytest.raises(AssertionError, match="not close"):
        assert_scans_as_by_token(rows=2, t=9, block=4, largest=0.1, dtype=torch.float64)


def test_a_compiled_scan_whose_gradient_starts_a_block_without_its_state_is_found(monkeypatch):
    pytest.importorskip("numba")
    from pytest_lmeval.zoo import _mamba_kernels

    forward = _mamba_kernels.forward

    def forgets(*arrays):
        forward(*arrays)
        arrays[-1][:, 1:] = 0.0

    monkeypatch.setattr(_mamba_kernels, "forward", forgets)
    assert_scans_as_by_token(rows=2, t=_mamba_kernels.BLOCK, block=4, largest=0.1, dtype=torch.float32)
    with pytest.raises(AssertionError, match="not close"):
        assert_scans_as_by_token(rows=2, t=_mamba_kernels.BLOCK + 1, block=4, largest=0.1, dtype=torch.float32)


def test_the_compiled_scan_gives_the_same_bits_in_any_chunks_and_threads():
    pytest.importorskip("numba")
    *inputs, by_y, by_hidden = scan_inputs(3, 50, 4, 37, torch.float32)
    u, dt, a, b_in, c_out, first = inputs
    whole, last = selective_scan(*inputs)
    for size in (1, 7, 16):
        chunks, hidden = [], first
        for part in zip(*(x.split(size, 1) for x in (u, dt, b_in, c_out)), strict=True):
            y, hidden = selective_scan(*part[:2], a, *part[2:], hidden)
            chunks.append(y)
        assert torch.equal(torch.cat(chunks, 1), whole)
        assert torch.equal(hidden, last)
    threads, expected = torch.get_num_threads(), gradients_of_scan(selective_scan, inputs, by_y, by_hidden)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(selective_scan(*inputs)[0], whole)
        assert all(map(torch.equal, gradients_of_scan(selective_scan, inputs, by_y, by_hidden), expected))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("index", range(6))
def test_a_number_that_is_none_reaches_what_is_scanned(index):
    *inputs, _, _ = scan_inputs(1, 3, 4, 37, torch.float32)
    inputs[index].view(-1)[0] = torch.nan
    assert selective_scan(*inputs)[0].isnan().any()


def test_the_compiled_scan_counts_the_operations_of_the_one_in_torch(monkeypatch):
    *inputs, by_y, _ = scan_inputs(2, 20, 4, 37, torch.float32)
    inputs[0].requires_grad_()
    counts = []
    for compiles in (_mamba.COMPILES, False):
        monkeypatch.setattr(_mamba, "COMPILES", compiles)
        counts.append(training_flops(lambda: (selective_scan(*inputs)[0] * by_y).sum()))
    assert counts[0] == counts[1]
    assert counts[0].backward == 3 * counts[0].forward > 0


@pytest.mark.parametrize("name", BY_TOKEN)
def test_the_recurrence_is_computed_in_32_bits_with_initial_time_steps_from_a_thousandth_to_a_tenth(name):
    for dtype in (torch.bfloat16, torch.float16):
        logits, state = small(name, dtype)(ids(1, 9))
        assert (logits.dtype, state_dtypes([layer.hidden for layer in state])) == (dtype, ["float32"])
    layer = load(f"zoo:{name}").module.layers[0]
    steps = F.softplus(layer.dt_proj.bias if name == "mamba" else layer.dt_bias).detach()
    assert 0.0009 < float(steps.min()) < float(steps.max()) < 0.11


def random_diagonal(t, height):
    """[1, t] of H - z I."""
    potential = 5 * torch.tanh(torch.randn(1, t, dtype=torch.float64, generator=torch.Generator().manual_seed(t)))
    return torch.complex(LAPLACIAN + potential, torch.full_like(potential, -height))


@settings(max_examples=12)
@given(t=st.integers(1, 60), height=st.floats(0.05, 2.0))
def test_the_sweeps_give_the_diagonal_of_the_dense_inverse(t, height):
    diagonal, beside = random_diagonal(t, height), torch.ones(t - 1, dtype=torch.complex128)
    matrix = torch.diag(diagonal[0]) + torch.diag(beside, 1) + torch.diag(beside, -1)
    left = sweep(diagonal, torch.zeros(1, dtype=torch.complex128))
    close(both_ways(diagonal, left)[0], torch.linalg.inv(matrix).diagonal(), 1e-13)
    corners = [torch.linalg.inv(matrix[:i, :i])[-1, -1] for i in range(1, t + 1)]
    close(left[0], torch.stack(corners), 1e-13)


def test_a_sweep_of_five_thousand_tokens_neither_overflows_nor_drifts():
    diagonal = random_diagonal(5_000, 0.01)
    swept = sweep(diagonal.to(torch.complex64), torch.zeros(1, dtype=torch.complex64))[0]
    g, expected = torch.zeros((), dtype=torch.complex128), []
    for d in diagonal[0]:
        g = 1 / (d - g)
        expected.append(g)
    assert float((swept - torch.stack(expected)).abs().max()) < 1e-3
