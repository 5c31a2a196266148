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
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

COMPILES = find_spec("numba") is not None
STATES_AT_ONCE = 1 << 18  # numbers of the states of a block of tokens


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
        u = F.silu(self.conv(recent).mT.contiguous())
        dt, b_in, c_out = self.x_proj(u).split([self.rank, *2 * [hidden.shape[1]]], dim=-1)
        dt = F.softplus(self.dt_proj(dt).to(hidden.dtype))
        y, hidden = selective_scan(u.to(dt), dt, -torch.exp(self.a_log.to(dt)), b_in.to(dt), c_out.to(dt), hidden)
        y = torch.addcmul(y.to(u), self.skip, u) * F.silu(z)
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
    """y [b, t, d] without D u, and the last h, from u, dt [b, t, d], A [n, d], B, C [b, t, n] and the h before, [b, n, d]."""
    if COMPILES and dt.dtype == torch.float32 and dt.device.type == "cpu":
        from pytest_lmeval.zoo._mamba_kernels import CompiledScan  # numba takes a while to import

        return CompiledScan.apply(u, dt, a, b_in, c_out, hidden)  # type: ignore[no-untyped-call,no-any-return]
    return SelectiveScan.apply(dt * u, dt, a, b_in, c_out, hidden)  # type: ignore[no-untyped-call,no-any-return]


class SelectiveScan(torch.autograd.Function):
    """The recurrence in blocks of tokens: only h_t = decay * h_{t-1} + ... is computed token by token, all else for a block.

    The decays and states of a block stay in the processor's cache. For the gradient, only the state before each block is kept,
    and the others are computed again: they are the largest tensors by far. No factor exceeds one, so nothing overflows.
    Tensors of a block are [tokens, b, ...]; `drive` is dt u.
    """

    @staticmethod
    def forward(
        ctx: Any, drive: Tensor, dt: Tensor, a: Tensor, b_in: Tensor, c_out: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = block_size(dt, hidden)
        decay, states = hidden.new_empty(2, size, *hidden.shape)
        y, starts = torch.empty_like(by_token(drive)), []
        for du, step, into, out, found in blocks(size, *map(by_token, (drive, dt, b_in, c_out)), y):
            starts.append(hidden)
            inside = states[: len(du)]
            hidden = advance(du, step, a, into, hidden, decay[: len(du)], inside).clone()
            torch.matmul(out[:, :, None], inside, out=found[:, :, None])
        ctx.save_for_backward(drive, dt, a, b_in, c_out, *starts)
        return by_token(y), hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor, by_h: Tensor) -> tuple[Tensor, ...]:
        drive, dt, a, b_in, c_out, *starts = ctx.saved_tensors
        size = block_size(dt, by_h)
        inputs = [by_token(x) for x in (drive, dt, b_in, c_out, by_y)]
        gradients, by_a = [torch.empty_like(x) for x in inputs[:4]], torch.zeros_like(a)
        buffers = by_h.new_empty(3, size, *by_h.shape)
        for before, (du, step, into, out, wanted, *found) in reversed(
            list(zip(starts, blocks(size, *inputs, *gradients), strict=True))
        ):
            by_du, by_step, by_into, by_out = found
            decay, states, by_states = buffers[:, : len(du)]
            advance(du, step, a, into, before, decay, states)
            torch.matmul(wanted[:, :, None], states.mT, out=by_out[:, :, None])
            torch.mul(wanted[:, :, None], out[..., None], out=by_states)
            by_states[-1].add_(by_h)
            by_each = by_states.unbind()
            for earlier, later, kept in reversed(list(zip(by_each, by_each[1:], decay[1:].unbind(), strict=False))):
                earlier.addcmul_(kept, later)
            torch.matmul(into[:, :, None], by_states, out=by_du[:, :, None])
            torch.matmul(du[:, :, None], by_states.mT, out=by_into[:, :, None])
            by_kept = by_states.mul_(decay)  # the gradient by decay * h_{t-1}'s logarithm, once times h_{t-1}
            by_h = by_kept[0].clone()
            by_kept[1:].mul_(states[:-1])
            by_kept[0].mul_(before)
            torch.sum(torch.mul(by_kept, a, out=decay), 2, out=by_step)
            by_a += by_kept.mul_(step[:, :, None]).sum((0, 1))
        by_drive, by_dt, by_b, by_c = map(by_token, gradients)
        return by_drive, by_dt, by_a, by_b, by_c, by_h


def advance(drive: Tensor, dt: Tensor, a: Tensor, b_in: Tensor, h: Tensor, decay: Tensor, states: Tensor) -> Tensor:
    """The last h [b, n, d] of a block; writes all of them to `states`, and their factors to `decay` [tokens, b, n, d]."""
    torch.mul(dt[:, :, None], a, out=decay).exp_()
    torch.mul(drive[:, :, None], b_in[..., None], out=states)
    for kept, after in zip(decay.unbind(), states.unbind(), strict=True):
        h = after.addcmul_(kept, h)
    return h


def block_size(dt: Tensor, hidden: Tensor) -> int:
    """The number of tokens whose states are few enough to stay in a cache."""
    return min(dt.shape[1], max(1, STATES_AT_ONCE // hidden.numel()))


def blocks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`size` tokens of each of the tensors [t, ...] at a time."""
    return zip(*(torch.split(x, size) for x in tensors), strict=True)


def by_token(x: Tensor) -> Tensor:
    """[t, b, ...] from [b, t, ...], or back."""
    return x.transpose(0, 1).contiguous()


def load() -> Mamba:
    """Exact for any chunking, with a constant state. Random weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed accelerators too
        return Mamba().eval()
