"""`ttt`: a byte-level language model whose memory is a small linear model that it trains while it reads.

Each head of each layer holds fast weights W [f, f] and b [1, f]. Sixteen tokens (a mini-batch, K) at a time, one step of
gradient descent brings LN(k W + b) closer to v - k, for keys k and values v of those tokens; a query q then reads
q + LN(q W + b). All gradients of a mini-batch are taken at the weights that it began with, so it is a few matrix products:

    g_k  = d/dz 1/2 |LN(z) - (v_k - k_k)|^2  at  z = k_k W + b        LN with a learned scale and shift for each head
    z_t  = q_t W + b - sum over k <= t of  tau_t lr_k (q_t . k_k + 1) g_k
    W, b = W - tau_K sum of lr_k k_k^T g_k,  b - tau_K sum of lr_k g_k        when the mini-batch is full

lr_k = base_lr sigmoid(w . x_k + c) / f is learned, and so is tau_t = max(0, 1 / t + ...), for the t-th token of a mini-batch.
Since tau_t stands before the sum, a chunk may end anywhere: the state is the weights that the mini-batch began with, the
sums so far, and the place in the mini-batch. It does not grow.

Shapes: b rows, t tokens, d width, h heads, f = d / h, K mini-batch, m tokens of one mini-batch (at most K).

    model = load()                                   # random weights from a seed, until it is trained
    logits, state = model(input_ids)                 # [b, t] -> [b, t, 256]
    logits, state = model(more_ids, state)           # goes on where the first call ended

TTT-Linear: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


class LayerState(NamedTuple):
    """What a layer remembers. Rows 0 to f - 1 of a matrix are of W, and row f is of b: a key has a one appended."""

    weights: Tensor  # [b, h, f + 1, f]  fast weights as the mini-batch began
    sums: Tensor  # [b, h, f + 1, f]  sum of lr_k k_k^T g_k over the tokens of the mini-batch so far
    place: int  # how many those are, less than K


class FastLinear(nn.Module):
    """The layer: test-time training of a linear model in each head."""

    def __init__(self, width: int, heads: int, mini_batch_size: int, base_lr: float) -> None:
        super().__init__()
        size = width // heads
        self.heads, self.mini_batch_size, self.base_lr = heads, mini_batch_size, base_lr
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.rate = nn.Linear(width, heads)
        self.tau = nn.Parameter(torch.zeros(mini_batch_size))
        self.weight = nn.Parameter(0.02 * torch.randn(heads, size, size))
        self.bias = nn.Parameter(torch.zeros(heads, 1, size))
        self.scale = nn.Parameter(torch.ones(heads, 1, size))
        self.shift = nn.Parameter(torch.zeros(heads, 1, size))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.gate = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        b, t, d = x.shape
        weights, sums, place = state or self.blank(b)
        fine = weights.dtype  # float32 at least: what is learned in small steps would be lost in fewer digits
        q, k, v = self.qkv(x).to(fine).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(torch.stack([q, k]), place, self.mini_batch_size)
        target, scale, shift = v - k, self.scale.to(fine), self.shift.to(fine)
        rate = self.base_lr * self.rate(x).to(fine).sigmoid().transpose(1, 2)[..., None] / q.shape[-1]  # [b, h, t, 1]
        tau = self.taus(fine)

        first = min(self.mini_batch_size - place, t)
        sizes = [first, *(min(self.mini_batch_size, t - i) for i in range(first, t, self.mini_batch_size))]
        read = []
        with_one = F.pad(torch.stack([q, k]), (0, 1), value=1.0)
        for (q1, k1), goal, lr in zip(with_one.split(sizes, 3), target.split(sizes, 2), rate.split(sizes, 2), strict=True):
            steps = lr * gradient(k1 @ weights, goal, scale, shift)
            within = (q1 @ k1.mT).tril() @ steps
            now = tau[place : place + len(k1[0, 0])]
            read.append(q1 @ weights - now * (q1 @ sums + within))
            sums, place = sums + k1.mT @ steps, place + len(now)
            if place == self.mini_batch_size:
                weights, sums, place = weights - tau[-1] * sums, torch.zeros_like(sums), 0
        y = q + F.layer_norm(torch.cat(read, 2), q.shape[-1:], eps=EPS) * scale + shift
        y = self.norm(y.transpose(1, 2).reshape(b, t, d).to(x.dtype))
        return self.out(F.gelu(self.gate(x)) * y), LayerState(weights, sums, place)

    def blank(self, b: int) -> LayerState:
        initial = torch.cat([self.weight, self.bias], 1)
        weights = initial.to(torch.promote_types(initial.dtype, torch.float32)).repeat(b, 1, 1, 1)
        return LayerState(weights, torch.zeros_like(weights), 0)

    def taus(self, dtype: torch.dtype) -> Tensor:
        """tau_t [K, 1]."""
        places = torch.arange(1, self.mini_batch_size + 1, device=self.tau.device, dtype=dtype)
        return (1 / places + self.tau.to(dtype)).clamp(min=0)[:, None]

    def learned(self, state: LayerState) -> Tensor:
        """The fast weights [b, h, f + 1, f] that the last token was read with."""
        return state.weights - self.taus(state.sums.dtype)[state.place - 1] * state.sums


class Block(nn.Module):
    """A layer with fast weights, and a gated feed-forward (SwiGLU)."""

    def __init__(self, width: int, heads: int, mini_batch_size: int, base_lr: float, hidden: int) -> None:
        super().__init__()
        self.fast = FastLinear(width, heads, mini_batch_size, base_lr)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        mixed, state = self.fast(norm(x), state)
        x = x + mixed
        gate, up = self.gate_up(norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up), state


class TTT(nn.Module):
    """Token ids in, logits of the next token out; see the head of this file."""

    constant_state = True

    def __init__(
        self,
        vocab_size: int = 256,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        mini_batch_size: int = 16,
        base_lr: float = 1.0,
        hidden: int = 320,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Block(width, heads, mini_batch_size, base_lr, hidden) for _ in range(layers))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, input_ids: Tensor, state: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Logits [b, t, v] of the token after each of `input_ids` [b, t], and the state to go on from."""
        x = norm(self.embed(input_ids))
        new_state = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, state[index] if state else None)
            new_state.append(layer_state)
        return norm(x) @ self.embed.weight.T, new_state

    def fast_weights(self, state: list[LayerState] | None) -> dict[str, Tensor]:
        """What the model has learned from what it read: W [b, h, f, f] and b [b, h, 1, f] of each layer; of None, at the beginning."""
        found = {}
        for index, layer in enumerate(self.layers):
            learned = layer.fast.learned(state[index] if state else layer.fast.blank(1))
            found[f"layers.{index}.W"], found[f"layers.{index}.b"] = learned[:, :, :-1], learned[:, :, -1:]
        return found


def norm(x: Tensor) -> Tensor:
    """Root mean square norm over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def gradient(z: Tensor, target: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """d/dz of 1/2 |LN(z) - target|^2 over the last axis, LN(z) = scale * (z - mean) / deviation + shift: as LN's backward has it."""
    deviation = (z.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    unit = (z - z.mean(-1, keepdim=True)) / deviation
    outer = (scale * unit + shift - target) * scale
    return (outer - outer.mean(-1, keepdim=True) - unit * (outer * unit).mean(-1, keepdim=True)) / deviation


def rotate(x: Tensor, place: int, period: int, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding of x [..., t, f] at places place, place + 1, ... that begin anew after `period` (Su et al. 2021)."""
    t, half = x.shape[-2], x.shape[-1] // 2
    places = (torch.arange(place, place + t, device=x.device, dtype=x.dtype) % period)[:, None]
    angles = places * base ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)  # [t, f / 2]
    cos, sin = angles.cos(), angles.sin()
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def load() -> TTT:
    """The model with random weights, the same ones every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TTT().eval()
