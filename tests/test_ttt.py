"""`zoo:ttt`: it computes what the paper says token by token, the laws catch broken versions, and it learns while it reads.

`test_zoo` tests that chunks give the logits and gradients of one pass.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from pytest_lmeval.laws._probe import probe
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.zoo import _ttt as ttt

K = 4


def tiny(dtype=torch.float64, *, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ttt.TTT(32, width=16, layers=2, heads=2, mini_batch_size=K)
        for name, parameter in model.named_parameters():  # none is zero or one: its term would be missing unnoticed
            if name.endswith(("tau", "fast.bias", "scale", "shift")):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


# --------------------------------------------------------------------------- the paper, token by token


def layer_norm(x, scale, shift):
    return scale * (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() + shift


def inner_gradient(layer, head, weights, bias, k, v):
    """The gradient of the loss of the fast weights at W k + b, by autograd."""
    z = (k @ weights + bias).detach().requires_grad_()
    loss = 0.5 * (layer_norm(z, layer.scale[head, 0].detach(), layer.shift[head, 0].detach()) - (v - k)).square().sum()
    return torch.autograd.grad(loss, z)[0]


def rotated(x, position):
    half = len(x) // 2
    turned = torch.view_as_complex(torch.stack([x[:half], x[half:]], -1))
    angle = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = turned * torch.polar(torch.ones(half, dtype=torch.float64), angle)
    return torch.cat([turned.real, turned.imag])


def naive_head(layer, head, inputs, q, k, v):
    """y [t, f] of one head for q, k, v [t, f]: a loop over tokens."""
    size, first = q.shape[1], (layer.weight[head], layer.bias[head, 0])
    (weights, bias), outputs, steps = first, [], []
    for t in range(len(q)):
        index = t % K
        query, key = rotated(q[t], index), rotated(k[t], index)
        lr = layer.base_lr * torch.sigmoid(layer.rate.weight[head] @ inputs[t] + layer.rate.bias[head]) / size
        steps.append((key, lr * inner_gradient(layer, head, weights, bias, key, v[t])))
        tau = max(0.0, 1 / (index + 1) + layer.tau[index].item())
        z = query @ weights + bias
        for old, step in steps:
            z = z - tau * (query @ old) * step - tau * step
        outputs.append(query + layer_norm(z, layer.scale[head, 0], layer.shift[head, 0]))
        if index == K - 1:
            forgotten = torch.sigmoid(layer.forget[head])
            weights = weights + forgotten * (first[0] - weights) - tau * sum(torch.outer(old, step) for old, step in steps)
            bias = bias + forgotten * (first[1] - bias) - tau * sum(step for _, step in steps)
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


@pytest.mark.parametrize("seed", range(2))
def test_a_layer_equals_the_paper_token_by_token(seed):
    layer = tiny(seed=seed).layers[0].fast
    x = torch.randn(2 * K + 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = naive_layer(layer, x).detach()
    torch.testing.assert_close(layer(x[None], None)[0][0].detach(), expected, rtol=0, atol=1e-10)
    for name in ("tau", "forget", "bias", "scale", "shift"):
        wrong = tiny(seed=seed).layers[0].fast
        getattr(wrong, name).data += 0.01 * torch.arange(getattr(wrong, name).numel()).view_as(getattr(wrong, name))
        assert (wrong(x[None], None)[0][0] - expected).abs().max() > 1e-6, name


# --------------------------------------------------------------------------- broken versions


class DropsSums(ttt.TTT):
    """Wrong: the gradients of an incomplete mini-batch are lost at the end of a chunk."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits, [layer._replace(sums=torch.zeros_like(layer.sums)) for layer in state]


class PadsMiniBatch(ttt.TTT):
    """Wrong: a chunk is padded with zeros to whole mini-batches, and the fast weights learn them too."""

    def forward(self, input_ids, state=None):
        logits, _ = super().forward(input_ids, state)
        return logits, super().forward(F.pad(input_ids, (0, -input_ids.shape[1] % K)), state)[1]


class RestartsMiniBatch(ttt.TTT):
    """Wrong: every chunk begins a mini-batch."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits, [layer._replace(filled=0) for layer in state]


OTHERS = [pytest.param(wrong, marks=pytest.mark.thorough) for wrong in (PadsMiniBatch, RestartsMiniBatch)]


@pytest.mark.parametrize("wrong", [DropsSums, *OTHERS])
def test_the_laws_catch_a_broken_version(wrong):
    torch.manual_seed(0)
    model = wrong(32, width=16, layers=1, heads=2, mini_batch_size=K).eval()
    assert not probe(as_model(model), budget=1000).laws["splits"].kept


# --------------------------------------------------------------------------- fast weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fast_weights_are_at_least_float32(dtype):
    model = tiny(dtype)
    logits, state = model(torch.arange(K + 1)[None])
    assert logits.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert all((layer.tail.dtype, layer.weights.dtype, layer.sums.dtype) == (dtype, wide, wide) for layer in state)


def test_fast_weights_begin_with_the_initial_ones_and_change_with_every_token():
    model, ids = tiny(), torch.randint(0, 32, (2, 3 * K), generator=torch.Generator().manual_seed(0))
    initial = model.fast_weights(None)
    assert list(initial) == ["layers.0.W", "layers.0.b", "layers.1.W", "layers.1.b"]
    torch.testing.assert_close(initial["layers.1.W"][0], model.layers[1].fast.weight)
    state, seen = None, [initial]
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            _, state = model(token, state)
            seen.append(model.fast_weights(state))
    assert (seen[-1]["layers.0.W"].shape, seen[-1]["layers.0.b"].shape) == ((2, 2, 8, 8), (2, 2, 1, 8))
    for before, after in pairwise(seen):
        assert all((before[name] != after[name]).any() for name in initial)


def pairs(count, seed, rows=8, keys=6, values=4):
    """Keys, each followed by its value; each row has its own table."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, values, (rows, keys), generator=generator)
    drawn = torch.randint(0, keys, (rows, count), generator=generator)
    return torch.stack([drawn, keys + table.gather(1, drawn)], dim=-1).flatten(1)


def test_it_remembers_far_beyond_the_length_that_it_was_trained_on():
    torch.manual_seed(0)
    model = ttt.TTT(10, width=32, layers=1, heads=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    for seed in range(120):
        ids = pairs(24, seed)
        F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    ids = pairs(800, seed=-1)
    with torch.no_grad():
        logits, _ = model.eval()(ids[:, :-1])
        late = F.cross_entropy(logits[:, -399::2].flatten(0, 1), ids[:, -399::2].flatten())
    assert late < 0.5 * math.log(4)
