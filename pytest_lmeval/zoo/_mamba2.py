"""`mamba2`: the state space duality of Mamba-2, whose recurrence is a matrix product within a block.

As in Mamba, but with one decay for all p channels x_t of a head, and B_t, C_t of n numbers shared by all heads:

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t B_t^T       h is [p, n], a = -exp(A_log) one number per head
    y_t = h_t C_t + D x_t = sum_{s <= t} exp(dt_{s+1} a + ... + dt_t a) (C_t . B_s) dt_s x_s + D x_t

The sum is attention without softmax, with a decaying mask; a chunk is read in blocks of `block` tokens by that product.
x, B and C go through a causal convolution over `kernel` tokens and a SiLU first. The output is norm(y * silu(z)).

Shapes: b rows, t tokens, v vocabulary, h heads, p channels each, d = h * p = expand * width, n numbers of state per channel.

Dao, Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality", 2024.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerState(NamedTuple):
    """The state of a layer."""

    tail: Tensor  # [b, d + 2 n, kernel - 1]  the convolution's last inputs
    hidden: Tensor  # [b, h, p, n]            h, in float32 at least


class Layer(nn.Module):
    """A gated recurrence with one decay per head."""

    def __init__(self, width: int, d_state: int, headdim: int, expand: int, kernel: int, block: int) -> None:
        super().__init__()
        d = expand * width
        self.d_state, self.headdim, self.heads, self.kernel, self.block = d_state, headdim, d // headdim, kernel, block
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.in_proj = nn.Linear(width, d + (d + 2 * d_state) + self.heads, bias=False)
        self.conv = nn.Conv1d(d + 2 * d_state, d + 2 * d_state, kernel, groups=d + 2 * d_state)
        self.a_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        dt = torch.exp(torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)))  # initially 0.001 to 0.1
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # its softplus is dt
        self.skip = nn.Parameter(torch.ones(self.heads))  # D
        self.norm_out = nn.RMSNorm(d, eps=1e-5)
        self.out_proj = nn.Linear(d, width, bias=False)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        d, n = self.heads * self.headdim, self.d_state
        z, u, dt = torch.split(self.in_proj(self.norm(x)), [d, d + 2 * n, self.heads], dim=-1)
        tail, hidden = state or self.blank(u)
        recent = torch.cat([tail, u.mT], dim=-1)  # [b, d + 2 n, kernel - 1 + t]
        u, b_in, c_out = torch.split(F.silu(self.conv(recent)).mT.to(hidden.dtype), [d, n, n], dim=-1)
        u = u.reshape(*u.shape[:2], self.heads, self.headdim)
        dt = F.softplus(dt.to(u) + self.dt_bias.to(u))  # [b, t, h]
        parts = (dt[..., None] * u, dt * -torch.exp(self.a_log.to(u)), b_in, c_out)
        outputs = []
        for drive, fade, into, out in zip(*(torch.split(part, self.block, dim=1) for part in parts), strict=True):
            y, hidden = ssd_block(drive, fade, into, out, hidden)
            outputs.append(y)
        y = (torch.cat(outputs, dim=1) + self.skip[:, None].to(u) * u).flatten(-2).to(x)
        tail = recent[..., x.shape[1] :].clone()  # a slice would keep the whole chunk in memory
        return x + self.out_proj(self.norm_out(y * F.silu(z))), LayerState(tail, hidden)

    def blank(self, u: Tensor) -> LayerState:
        wide = torch.promote_types(u.dtype, torch.float32)  # sums over a whole text need the precision
        tail = u.new_zeros(len(u), u.shape[-1], self.kernel - 1)
        return LayerState(tail, u.new_zeros(len(u), self.heads, self.headdim, self.d_state, dtype=wide))


class Mamba2(nn.Module):
    """Tokens in, logits of the next token out; see the module docstring."""

    constant_state = True

    def __init__(
        self,
        vocab_size: int = 256,
        width: int = 160,
        layers: int = 4,
        d_state: int = 64,
        headdim: int = 32,
        expand: int = 2,
        kernel: int = 4,
        block: int = 64,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width, d_state, headdim, expand, kernel, block) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, input_ids: Tensor, state: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Logits [b, t, v] of the token after each of `input_ids` [b, t], and the new state."""
        x, new_state = self.embed(input_ids), []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, state[index] if state else None)
            new_state.append(layer_state)
        return self.norm(x) @ self.embed.weight.T, new_state


def ssd_block(drive: Tensor, fade: Tensor, b_in: Tensor, c_out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """y [b, t, h, p] of one block without D x, and the last h.

    From drive = dt x [b, t, h, p], fade = dt a [b, t, h], B, C [b, t, n] and the h [b, h, p, n] before it.
    """
    fade, drive = fade.mT, drive.transpose(1, 2)  # [b, h, t], [b, h, t, p]
    between = torch.exp(segment_sums(fade))  # L [b, h, t, t]
    since = torch.exp(fade.cumsum(-1))[..., None]  # [b, h, t, 1] decay since the block began
    y = (between * (c_out @ b_in.mT)[:, None]) @ drive + since * (c_out[:, None] @ hidden.mT)
    until = between[..., -1, :, None]  # [b, h, t, 1] decay until the block ends
    return y.transpose(1, 2), since[..., -1:, :] * hidden + (until * drive).mT @ b_in[:, None]


def segment_sums(x: Tensor) -> Tensor:
    """[..., t, t] the sums x_{j+1} + ... + x_i if j <= i, else minus infinity, from x [..., t].

    Each is summed separately: differences of cumulative sums would lose the precision of small ones.
    """
    t = x.shape[-1]
    lower = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
    terms = x[..., None].expand(*x.shape, t).masked_fill(~lower.tril(-1), 0.0)
    return terms.cumsum(-2).masked_fill(~lower, float("-inf"))


def load() -> Mamba2:
    """Exact for any chunking, with a constant state. Random weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed accelerators too
        return Mamba2().eval()
