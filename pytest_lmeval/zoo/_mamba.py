"""`mamba`: a selective state space model, a diagonal recurrence whose decay depends on the token.

A layer is x + out_proj(y * silu(z)). The input is projected to u and z; u goes through a causal convolution over `kernel`
tokens, a SiLU, and the recurrence, for each channel with n numbers of state:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t         A = -exp(A_log), at first -1, -2, ..., -n (S4D-real)
    y_t = C_t h_t + D u_t                            dt_t, B_t and C_t are projections of u_t

Shapes: b rows, t tokens, v vocabulary, d = expand * width channels, n numbers of state each.

Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerState(NamedTuple):
    """The state of a layer."""

    tail: Tensor  # [b, d, kernel - 1]  the convolution's last inputs
    hidden: Tensor  # [b, n, d]         h, in float32 at least


class Layer(nn.Module):
    """A gated selective recurrence."""

    def __init__(self, width: int, d_state: int, expand: int, kernel: int) -> None:
        super().__init__()
        d, self.rank, self.kernel = expand * width, -(-width // 16), kernel
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.in_proj = nn.Linear(width, 2 * d, bias=False)
        self.conv = nn.Conv1d(d, d, kernel, groups=d)
        self.x_proj = nn.Linear(d, self.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, d)
        self.a_log = nn.Parameter(torch.arange(1.0, d_state + 1).log()[:, None].repeat(1, d))
        self.skip = nn.Parameter(torch.ones(d))  # D
        self.out_proj = nn.Linear(d, width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.exp(torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)))  # initially 0.001 to 0.1
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # its softplus is dt

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        u, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        tail, hidden = state or self.blank(u)
        recent = torch.cat([tail, u.mT], dim=-1)  # [b, d, kernel - 1 + t]
        u = F.silu(self.conv(recent)).mT
        dt, b_in, c_out = self.x_proj(u).split([self.rank, *2 * [hidden.shape[1]]], dim=-1)
        dt = F.softplus(self.dt_proj(dt).to(hidden.dtype))
        y, hidden = selective_scan(u.to(dt), dt, -torch.exp(self.a_log.to(dt)), b_in.to(dt), c_out.to(dt), hidden)
        y = (y.to(u) + self.skip * u) * F.silu(z)
        tail = recent[..., x.shape[1] :].clone()  # a slice would keep the whole chunk in memory
        return x + self.out_proj(y), LayerState(tail, hidden)

    def blank(self, u: Tensor) -> LayerState:
        wide = torch.promote_types(u.dtype, torch.float32)  # sums over a whole text need the precision
        tail = u.new_zeros(len(u), u.shape[-1], self.kernel - 1)
        return LayerState(tail, u.new_zeros(len(u), *self.a_log.shape, dtype=wide))


class Mamba(nn.Module):
    """Tokens in, logits of the next token out; see the module docstring."""

    constant_state = True

    def __init__(
        self, vocab_size: int = 256, width: int = 160, layers: int = 4, d_state: int = 16, expand: int = 2, kernel: int = 4
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width, d_state, expand, kernel) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, input_ids: Tensor, state: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Logits [b, t, v] of the token after each of `input_ids` [b, t], and the new state."""
        x, new_state = self.embed(input_ids), []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, state[index] if state else None)
            new_state.append(layer_state)
        return self.norm(x) @ self.embed.weight.T, new_state


def selective_scan(u: Tensor, dt: Tensor, a: Tensor, b_in: Tensor, c_out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """y [b, t, d] without D u, and the last h, from u, dt [b, t, d], A [n, d], B, C [b, t, n] and the h before, [b, n, d].

    About sqrt(t) blocks are computed in parallel twice: from a zero state for their final states, which are carried from block
    to block, and from the carried states for the outputs. No factor exceeds one, so nothing overflows. Without autograd, it
    needs memory for a few sqrt(t) states.
    """
    rows, t, _ = u.shape
    blocks = math.isqrt(t) // rows  # rows are parallel already
    blocks = blocks if blocks > 3 else 1  # two passes over halves take as many steps as one over all
    length = -(-t // blocks)
    spare = blocks * length - t  # padding of the last block: dt = 0 changes no state
    parts = (F.pad(x, (0, 0, 0, spare)).view(rows, blocks, length, -1) for x in (dt * u, dt, b_in, c_out))
    columns = list(zip(*(part.unbind(2) for part in parts), strict=True))  # one token of each block: [b, blocks, d] or [..., n]

    starts = [hidden]  # of each block
    if blocks > 1:
        left = hidden.new_zeros(rows, blocks - 1, *a.shape)  # final states from zero
        for du, step, into, _ in columns:
            left = recurrence(left, du[:, :-1], step[:, :-1], a, into[:, :-1])
        kept = torch.exp(torch.stack([step for _, step, _, _ in columns]).sum(0)[:, :-1, None] * a)  # decay over a block
        for block in range(blocks - 1):
            starts.append(torch.addcmul(left[:, block], kept[:, block], starts[-1]))

    h, outputs = torch.stack(starts, dim=1), []
    for du, step, into, out in columns:
        h = recurrence(h, du, step, a, into)
        outputs.append((out[..., None, :] @ h)[..., 0, :])
    return torch.stack(outputs, dim=2).flatten(1, 2)[:, :t], h[:, -1].clone()


def recurrence(h: Tensor, du: Tensor, dt: Tensor, a: Tensor, b_in: Tensor) -> Tensor:
    """h [..., n, d] one token later, from du = dt u [..., d], dt [..., d], A [n, d] and B [..., n]."""
    kept = (dt[..., None, :] * a).exp_()  # in place, as below: these are the largest tensors here
    return (du[..., None, :] * b_in[..., None]).addcmul_(kept, h)


def load() -> Mamba:
    """Exact for any chunking, with a constant state. Random weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed accelerators too
        return Mamba().eval()
