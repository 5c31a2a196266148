"""`zoo:ttt`: what the paper says, token by token; exact however it is cut; and it learns, outside and inside."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from pytest_lmeval.laws._probe import probe
from pytest_lmeval.models._model import state_bytes, state_dtypes
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.zoo import _ttt as ttt

K = 4
PIECES = st.lists(st.integers(1, 11), min_size=1, max_size=7)


def tiny(dtype=torch.float64, *, seed=0, vocab_size=32):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ttt.TTT(vocab_size, width=16, layers=2, heads=2, mini_batch_size=K)
        for name, parameter in model.named_parameters():  # nothing is zero or one, so that nothing is left out unseen
            if name.endswith(("tau", "fast.bias", "scale", "shift")):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def ids_of(length, rows=2, vocab_size=32, seed=0):
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model, ids, sizes):
    state, parts = None, []
    for piece in torch.split(ids, sizes, dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    return torch.cat(parts, dim=1), state


# --------------------------------------------------------------------------- the paper, one token after the other


def layer_norm(x, scale, shift):
    return scale * (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() + shift


def inner_gradient(layer, head, weights, bias, k, v):
    """The gradient at W k + b of the loss that the fast weights are trained by, from autograd."""
    z = (k @ weights + bias).detach().requires_grad_()
    loss = 0.5 * (layer_norm(z, layer.scale[head, 0].detach(), layer.shift[head, 0].detach()) - (v - k)).square().sum()
    return torch.autograd.grad(loss, z)[0]


def rotated(x, place):
    half = len(x) // 2
    turned = torch.view_as_complex(torch.stack([x[:half], x[half:]], -1))
    angle = place * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = turned * torch.polar(torch.ones(half, dtype=torch.float64), angle)
    return torch.cat([turned.real, turned.imag])


def naive_head(layer, head, inputs, q, k, v):
    """y [t, f] of one head for q, k, v [t, f]: a loop over tokens, every token's own step written out."""
    size, first = q.shape[1], (layer.weight[head], layer.bias[head, 0])
    weights, bias = first
    outputs, steps = [], []
    for t in range(len(q)):
        place = t % K
        query, key = rotated(q[t], place), rotated(k[t], place)
        lr = layer.base_lr * torch.sigmoid(layer.rate.weight[head] @ inputs[t] + layer.rate.bias[head]) / size
        steps.append((key, lr * inner_gradient(layer, head, weights, bias, key, v[t])))
        tau = max(0.0, 1 / (place + 1) + layer.tau[place].item())
        z = query @ weights + bias
        for old, step in steps:
            z = z - tau * (query @ old) * step - tau * step
        outputs.append(query + layer_norm(z, layer.scale[head, 0], layer.shift[head, 0]))
        if place == K - 1:
            share = torch.sigmoid(layer.forget[head])
            weights = weights + share * (first[0] - weights) - tau * sum(torch.outer(old, step) for old, step in steps)
            bias = bias + share * (first[1] - bias) - tau * sum(step for _, step in steps)
            steps = []
    return torch.stack(outputs)


def naive_layer(layer, x):
    """The layer's output [t, d] for x [t, d]."""
    width, kernel = x.shape[1], layer.kernel
    padded = torch.cat([torch.zeros(kernel - 1, width, dtype=x.dtype), x])
    taps = layer.mix.weight[:, 0].view(width, 3, kernel)
    offsets = layer.mix.bias.view(width, 3)
    mixed = torch.stack([torch.einsum("kd,dsk->sd", padded[t : t + kernel], taps) + offsets.T for t in range(len(x))])
    heads = [
        (part @ projection.weight.T).view(len(x), layer.heads, -1)
        for part, projection in zip(mixed.unbind(1), (layer.qk, layer.qk, layer.v), strict=True)
    ]
    q, k = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in heads[:2])
    inputs = mixed[:, 2]
    read = [naive_head(layer, head, inputs, q[:, head], k[:, head], heads[2][:, head]) for head in range(layer.heads)]
    y = F.layer_norm(torch.cat(read, dim=1), (width,), layer.norm.weight, layer.norm.bias, 1e-6)
    return (F.gelu(inputs @ layer.gate.weight.T) * y) @ layer.out.weight.T


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_does_what_the_paper_says_token_by_token(seed):
    layer = tiny(seed=seed).layers[0].fast
    x = torch.randn(4 * K + 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        output, _ = layer(x[None], None)
    torch.testing.assert_close(output[0], naive_layer(layer, x).detach(), rtol=0, atol=1e-10)


def test_a_wrong_formula_would_be_seen():
    layer = tiny().layers[0].fast
    x = torch.randn(3 * K, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = naive_layer(layer, x).detach()
    for name in ("tau", "forget", "bias", "scale", "shift"):
        wrong = tiny().layers[0].fast
        getattr(wrong, name).data += 0.01 * torch.arange(getattr(wrong, name).numel()).view_as(getattr(wrong, name))
        assert (wrong(x[None], None)[0][0] - expected).abs().max() > 1e-6, name


def test_the_gradient_of_the_inner_loss_is_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    z, target, scale, shift = (torch.randn(5, 8, dtype=torch.float64, generator=generator) for _ in range(4))
    z.requires_grad_()
    (expected,) = torch.autograd.grad(0.5 * (layer_norm(z, scale, shift) - target).square().sum(), z)
    torch.testing.assert_close(ttt.gradient(z, target, scale, shift), expected, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------- any cut


@settings(max_examples=50)
@given(PIECES)
def test_any_cut_gives_the_logits_and_the_state_of_one_pass(sizes):
    ids = ids_of(sum(sizes))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = tiny(dtype)
        with torch.no_grad():
            (whole, state), (parts, carried) = model(ids), read(model, ids, sizes)
        torch.testing.assert_close(parts, whole, rtol=0, atol=tolerance)
        for one, other in zip(state, carried, strict=True):
            assert one.place == other.place == sum(sizes) % K
            torch.testing.assert_close(other[:-1], one[:-1], rtol=0, atol=tolerance)


def test_a_chunk_that_ends_inside_a_mini_batch_changes_nothing():
    model, ids = tiny(), ids_of(2 * K)
    with torch.no_grad():
        whole, _ = model(ids)
        for cut in range(1, 2 * K):
            torch.testing.assert_close(read(model, ids, [cut, 2 * K - cut])[0], whole, rtol=0, atol=1e-10)


@settings(max_examples=15)
@given(PIECES)
def test_any_cut_gives_the_gradients_of_one_pass(sizes):
    ids, found = ids_of(sum(sizes) + 1), []
    for pieces in ([sum(sizes)], sizes):
        model = tiny()
        logits, _ = read(model, ids[:, :-1], pieces)
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        other = found[1][name]
        if gradient is None or other is None:  # nothing is forgotten before the first mini-batch is full
            assert gradient is other is None, name
            assert name.endswith("forget")
        else:
            torch.testing.assert_close(other, gradient, rtol=0, atol=1e-10)


def test_training_reaches_through_the_inner_updates():
    """A token's loss depends on what an earlier mini-batch taught, and so on how it was taught."""
    model, ids = tiny(), ids_of(3 * K)
    model(ids)[0][:, -1].square().sum().backward()
    for layer in model.layers:
        for name in ("weight", "bias", "tau", "forget"):
            assert getattr(layer.fast, name).grad.abs().sum() > 0, name
        assert layer.fast.rate.weight.grad.abs().sum() > 0


class DropsSums(ttt.TTT):
    """Wrong: the gradients gathered in a mini-batch that is not full are lost at the end of a chunk."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits, [layer._replace(sums=torch.zeros_like(layer.sums)) for layer in state]


class PadsMiniBatch(ttt.TTT):
    """Wrong: a chunk is filled up with zeros to whole mini-batches, and the fast weights learn them too."""

    def forward(self, input_ids, state=None):
        logits, new_state = super().forward(input_ids, state)
        if spare := -input_ids.shape[1] % self.layers[0].fast.mini_batch_size:
            _, new_state = super().forward(F.pad(input_ids, (0, spare)), state)
        return logits, new_state


class KeepsPlace(ttt.TTT):
    """Wrong: every chunk is taken for the beginning of a mini-batch."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits, [layer._replace(place=0) for layer in state]


def test_its_verdict_is_exact_for_any_chunk():
    result = probe(load("zoo:ttt"), budget=8.0)
    assert result.verdict == "exact-any-chunk", result


@pytest.mark.parametrize("wrong", [DropsSums, PadsMiniBatch, KeepsPlace])
def test_a_broken_twin_is_caught_by_the_laws(wrong):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = wrong(32, width=16, layers=1, heads=2, mini_batch_size=K).eval()
    result = probe(as_model(model), examples=2, budget=60.0)
    assert result.verdict not in ("exact-any-chunk", "consistent")
    assert not result.laws["splits"].kept


# --------------------------------------------------------------------------- its state


def test_its_state_does_not_grow_and_owns_its_memory():
    model, state, sizes = ttt.load(), None, set()
    with torch.no_grad():
        for chunk in (1, 300, 16, 7):
            _, state = model(torch.zeros(1, chunk, dtype=torch.long), state)
            sizes.add(state_bytes(state))
    own = sum(part.numel() * part.element_size() for layer in state for part in layer[:-1])
    assert sizes == {own}


def test_a_state_is_never_written_to():
    model = tiny()
    with torch.no_grad():
        _, state = model(ids_of(K + 2))
        before = [[part.clone() for part in layer[:-1]] for layer in state]
        model(ids_of(2 * K), state)
    for layer, copy in zip(state, before, strict=True):
        assert all(torch.equal(*parts) for parts in zip(layer[:-1], copy, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fast_weights_have_at_least_the_digits_of_float32(dtype):
    model = tiny(dtype)
    logits, state = model(ids_of(K + 1))
    assert logits.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert all(layer.weights.dtype == layer.sums.dtype == wide for layer in state)
    assert state_dtypes(state)[0] == str(dtype).removeprefix("torch.")


def test_the_fast_weights_of_no_state_are_the_initial_ones_and_move_with_every_token():
    model, ids = tiny(), ids_of(3 * K, rows=2)
    initial = model.fast_weights(None)
    assert list(initial) == ["layers.0.W", "layers.0.b", "layers.1.W", "layers.1.b"]
    torch.testing.assert_close(initial["layers.1.W"][0], model.layers[1].fast.weight)
    state, seen = None, [initial]
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            _, state = model(token, state)
            seen.append(model.fast_weights(state))
    assert seen[-1]["layers.0.W"].shape == (2, 2, 8, 8)
    assert seen[-1]["layers.0.b"].shape == (2, 2, 1, 8)
    for before, after in pairwise(seen):
        assert all((before[name] != after[name]).any() for name in initial)


# --------------------------------------------------------------------------- it learns


def trained(model, batches, lr=3e-3):
    """The losses of AdamW with warm-up and gradients clipped at one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    losses = []
    for ids in batches:
        logits, _ = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_it_learns_a_tiny_text():
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog, again and again. " * 2))[None]
    model = tiny(torch.float32, vocab_size=256)
    losses = trained(model, [text] * 100, lr=1e-2)
    assert losses[0] > 4
    assert losses[-1] < 1
    assert all(math.isfinite(loss) for loss in losses)


def pairs(count, seed, rows=8, keys=6, values=4):
    """Keys and their values, in turns; each row has a table of its own."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, values, (rows, keys), generator=generator)
    drawn = torch.randint(0, keys, (rows, count), generator=generator)
    return torch.stack([drawn, keys + table.gather(1, drawn)], dim=-1).flatten(1)


def test_what_it_learned_to_remember_it_remembers_far_beyond_the_length_it_was_trained_on():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = ttt.TTT(10, width=32, layers=1, heads=1)
    trained(model, [pairs(24, seed) for seed in range(150)], lr=1e-2)
    ids = pairs(1500, seed=-1)
    with torch.no_grad():
        logits, _ = model.eval()(ids[:, :-1])
        late = F.cross_entropy(logits[:, -399::2].flatten(0, 1), ids[:, -399::2].flatten())
    assert late < 0.5 * math.log(4)
