"""`ttt`: a language model whose state is a linear model in each head, trained by gradient descent while it reads.

Each head of each layer has fast weights W [f, f] and b [1, f]. For each mini-batch of K tokens with keys k, values v and
queries q, one gradient step, taken at the weights before the mini-batch, brings LN(k W + b) closer to v - k:

    g_k  = d/dz 1/2 |LN(z) - (v_k - k_k)|^2  at  z = k_k W + b        LN with a learned scale and shift for each head
    z_t  = q_t W + b - tau_t sum over k <= t of  lr_k (q_t . k_k + 1) g_k        the output is q_t + LN(z_t)
    W, b = W - tau_K sum of lr_k k_k^T g_k,  b - tau_K sum of lr_k g_k           when the mini-batch is full

lr_k = base_lr sigmoid(w . x_k + c) / f is learned, and so is tau_t = max(0, 1 / t + ...), for the t-th token of a mini-batch.
Since tau_t is a factor of the sum, the state holds the sum so far, and a chunk may end anywhere.

Keys and queries share a projection, after separate convolutions, as in the paper's Mamba backbone. Initially a key is mostly
of the token before. Two things are not in the paper: keys and queries are normalized, and after each mini-batch the weights
return towards the initial ones by a learned fraction, without which a model trained on 128 tokens fails after some thousand.

Shapes: b rows, t tokens, v vocabulary, d width, h heads, f = d / h (even), K tokens of a mini-batch.

TTT-Linear: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


class LayerState(NamedTuple):
    """The state of a layer. Rows 0 to f - 1 of a matrix belong to W, and row f to b: a key has a one appended."""

    tail: Tensor  # [b, d, kernel - 1]   the convolution's last inputs
    weights: Tensor  # [b, h, f + 1, f]  fast weights at the beginning of the mini-batch
    sums: Tensor  # [b, h, f + 1, f]  sum of lr_k k_k^T g_k over the tokens of the mini-batch so far
    filled: int  # number of these tokens, less than K


class FastLinear(nn.Module):
    """The layer: a linear model in each head, trained while it reads."""

    def __init__(self, width: int, heads: int, mini_batch_size: int, base_lr: float = 1.0, kernel: int = 4) -> None:
        super().__init__()
        size = width // heads
        self.heads, self.mini_batch_size, self.base_lr, self.kernel = heads, mini_batch_size, base_lr, kernel
        self.mix = nn.Conv1d(width, 3 * width, kernel, groups=width)  # for queries, keys and values
        self.qk, self.v, self.gate, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.rate = nn.Linear(width, heads)
        self.tau = nn.Parameter(torch.zeros(mini_batch_size))
        self.forget = nn.Parameter(torch.logit(2.0 ** -torch.linspace(3, 6, heads)))  # initially 1/8 to 1/64
        self.weight, self.bias = nn.Parameter(0.02 * torch.randn(heads, size, size)), nn.Parameter(torch.zeros(heads, 1, size))
        self.scale, self.shift = nn.Parameter(torch.ones(heads, 1, size)), nn.Parameter(torch.zeros(heads, 1, size))
        self.norm = nn.LayerNorm(width, eps=EPS)
        for part, token in enumerate((-1, -2, -1)):  # a key is mostly of the token before
            self.mix.weight.data[part::3, 0, token] += 1

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        b, t, d = x.shape
        state = state or self.blank(b)
        recent = torch.cat([state.tail, x.mT], dim=-1)  # [b, d, kernel - 1 + t]
        for_q, for_k, x = self.mix(recent).view(b, d, 3, t).permute(2, 0, 3, 1)
        parts = torch.stack([self.qk(for_q), self.qk(for_k), self.v(x)]).to(state.weights.dtype)
        q, k, v = parts.view(3, b, t, self.heads, -1).transpose(2, 3)  # [b, h, t, f] each
        q, k = rotate(norm(torch.stack([q, k])), state.filled, self.mini_batch_size)
        rate = self.rate(x).to(q).sigmoid().mT[..., None] * (self.base_lr / q.shape[-1])  # [b, h, t, 1]
        z, state = self.learn(q, k, v - k, rate, state)
        y = q + F.layer_norm(z, z.shape[-1:], eps=EPS) * self.scale + self.shift
        y = self.norm(y.transpose(1, 2).reshape(b, t, d).to(x.dtype))
        tail = recent[..., t:].clone()  # a slice would keep the whole chunk in memory
        return self.out(F.gelu(self.gate(x)) * y), state._replace(tail=tail)

    def learn(self, q: Tensor, k: Tensor, target: Tensor, rate: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """q W + b for queries q [b, h, t, f], mini-batch by mini-batch, and the state with the new fast weights."""
        (_, weights, sums, filled), size, t = state, self.mini_batch_size, q.shape[2]
        tau, initial, forgotten = self.taus(), self.initial(), self.forget.to(q).sigmoid()[:, None, None]
        q, k = (F.pad(x, (0, 1), value=1.0) for x in (q, k))
        sizes = [min(size - filled, t), *(min(size, t - begin) for begin in range(size - filled, t, size))]
        read = []
        for q1, k1, goal, lr in zip(*(torch.split(x, sizes, dim=2) for x in (q, k, target, rate)), strict=True):
            steps = lr * gradient(k1 @ weights, goal, self.scale, self.shift)
            here = tau[filled : filled + q1.shape[2]]
            read.append(q1 @ weights - here * (q1 @ sums + (q1 @ k1.mT).tril() @ steps))
            sums, filled = sums + k1.mT @ steps, filled + q1.shape[2]
            if filled == size:
                weights = weights + forgotten * (initial - weights) - tau[-1] * sums
                sums, filled = torch.zeros_like(sums), 0
        return torch.cat(read, dim=2), LayerState(state.tail, weights, sums, filled)

    def blank(self, b: int) -> LayerState:
        weights = self.initial().repeat(b, 1, 1, 1)
        return LayerState(self.mix.weight.new_zeros(b, self.out.in_features, self.kernel - 1), weights, 0.0 * weights, 0)

    def initial(self) -> Tensor:
        """The fast weights [h, f + 1, f] before the first token."""
        return wide(torch.cat([self.weight, self.bias], dim=1))

    def taus(self) -> Tensor:
        """tau_t [K, 1]."""
        tau = wide(self.tau)
        return (1 / torch.arange(1, len(tau) + 1).to(tau) + tau).clamp(min=0)[:, None]


class Block(nn.Module):
    """Fast weights and a gated feed-forward (SwiGLU)."""

    def __init__(self, width: int, hidden: int, fast: FastLinear) -> None:
        super().__init__()
        self.fast = fast
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        mixed, state = self.fast(norm(x), state)
        x = x + mixed
        gate, up = self.gate_up(norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up), state


class TTT(nn.Module):
    """Token ids in, logits of the next token out; see the module docstring."""

    constant_state = True

    def __init__(
        self,
        vocab_size: int = 256,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        mini_batch_size: int = 16,
        hidden: int = 320,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Block(width, hidden, FastLinear(width, heads, mini_batch_size)) for _ in range(layers))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, input_ids: Tensor, state: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Logits [b, t, v] of the token after each of `input_ids` [b, t], and the new state."""
        x, new_state = norm(self.embed(input_ids)), []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, state[index] if state else None)
            new_state.append(layer_state)
        return norm(x) @ self.embed.weight.T, new_state

    def fast_weights(self, state: list[LayerState] | None) -> dict[str, Tensor]:
        """W [b, h, f, f] and b [b, h, 1, f] of each layer after the last token; for None, before the first."""
        found = {}
        for index, fast in enumerate(part for part in self.modules() if isinstance(part, FastLinear)):
            layer = state[index] if state else fast.blank(1)
            learned = layer.weights - fast.taus()[layer.filled - 1] * layer.sums  # also within a mini-batch
            found[f"layers.{index}.W"], found[f"layers.{index}.b"] = learned[:, :, :-1], learned[:, :, -1:]
        return found


def wide(x: Tensor) -> Tensor:
    """In float32 at least: 16 bits would lose the small gradient steps."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(x: Tensor) -> Tensor:
    """Root mean square norm over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def gradient(z: Tensor, target: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """d/dz of 1/2 |LN(z) - target|^2 over the last axis, where LN(z) = scale * (z - mean) / deviation + shift."""
    deviation = (z.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    unit = (z - z.mean(-1, keepdim=True)) / deviation
    outer = (scale * unit + shift - target) * scale
    return (outer - outer.mean(-1, keepdim=True) - unit * (outer * unit).mean(-1, keepdim=True)) / deviation


def rotate(x: Tensor, first: int, period: int, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of x [..., t, f] at positions first, first + 1, ..., modulo `period` (Su et al. 2021)."""
    t, half = x.shape[-2], x.shape[-1] // 2
    positions = (torch.arange(first, first + t, device=x.device, dtype=x.dtype) % period)[:, None]
    angles = positions * base ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)  # [t, f / 2]
    left, right, cos, sin = *x.chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def load() -> TTT:
    """Exact for any chunking, with a constant state. Random weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return TTT().eval()
