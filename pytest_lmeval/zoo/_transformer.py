"""`transformer` and `windowed`: a causal transformer with full or sliding window attention.

A layer is x + attend(norm(x)), then x + down(silu(gate) * up) of norm(x). Query i attends to the keys j <= i, by
softmax_j(R_i q_i . R_j k_j / sqrt(e)), where R_i rotates pairs of coordinates by angles proportional to i.

* Without a window, the state is all rotated keys and values: it grows with the text.
* With a window, a query sees i - window < j <= i, and the state is the last window - 1 keys and values. Keys are stored
  unrotated and rotated by their position relative to the queries, so that angles stay precise in texts of any length.

Shapes: b rows, t tokens, v vocabulary, d width, h heads, e = d / h, s tokens in the state.

Attention: Vaswani et al., "Attention Is All You Need", 2017. RoPE: Su et al., "RoFormer", 2021. SwiGLU: Shazeer, "GLU Variants
Improve Transformer", 2020. RMSNorm: Zhang, Sennrich, 2019. All of them together: Touvron et al., "LLaMA", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerState(NamedTuple):
    """The state of a layer: s is all tokens so far, or the last window - 1 of them."""

    keys: Tensor  # [b, h, s, e]
    values: Tensor  # [b, h, s, e]


class Pack(NamedTuple):
    """What the tokens of several sequences in one row see, and where each stands in its own."""

    positions: Tensor  # [t]
    visible: Tensor  # [t, s + t]


class Layer(nn.Module):
    """Attention, full or windowed, and a gated feed-forward."""

    def __init__(self, width: int, heads: int, window: int | None, hidden: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm, self.norm_mlp = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, state: LayerState | None, pack: Pack | None = None) -> tuple[Tensor, LayerState]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [b, h, t, e] each
        mixed, state = self.attend(q, k, v, state or LayerState(k[:, :, :0], v[:, :, :0]), pack)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up), state

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: LayerState, pack: Pack | None = None) -> tuple[Tensor, LayerState]:
        seen, t = state.keys.shape[2], q.shape[2]
        if self.window is None:
            pack = pack or Pack(torch.arange(seen, seen + t), q.new_ones(t, seen + t, dtype=torch.bool).tril(seen))
            q, k = rotate(torch.stack([q, k]), *angles(pack.positions, q))
        keys, values = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        if self.window is None or pack is not None:
            visible = None if pack is None else pack.visible
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible), LayerState(keys, values)
        first = max(seen + t - (self.window - 1), 0)
        # clone: a slice would keep the whole chunk in memory
        kept = LayerState(keys[:, :, first:].clone(), values[:, :, first:].clone())
        return banded_attention(q, keys, values, self.window), kept


class Transformer(nn.Module):
    """Tokens in, logits of the next token out; see the module docstring."""

    def __init__(
        self,
        vocab_size: int = 256,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        window: int | None = None,
        hidden: int = 344,
        context_length: int = 1024,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.constant_state = window is not None
        self.context_length = context_length if window is None else None  # angles beyond are never trained
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width, heads, window, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        state: list[LayerState] | None = None,
        pack: Pack | None = None,
        wanted: Tensor | slice = slice(None),
    ) -> tuple[Tensor, list[LayerState]]:
        """Logits [b, t, v] of the token after each of `input_ids` [b, t], or after those `wanted`, and the new state."""
        x, new_state = self.embed(input_ids), []
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)  # the rows are small, since the head shares them
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, state[index] if state else None, pack)
            new_state.append(layer_state)
        return self.norm(x[:, wanted]) @ self.embed.weight.T, new_state

    def packed_step(
        self, input_ids: Tensor, state: list[LayerState] | None, positions: Tensor, visible: Tensor, wanted: Tensor, more: bool
    ) -> tuple[Tensor, list[LayerState] | None]:
        """Tokens [1, t] of several sequences in one row: logits [n, v] of those `wanted`, and the new state if `more`."""
        if self.constant_state:
            raise TypeError("a windowed state has no column for each token")
        logits, new_state = self(input_ids, state, Pack(positions.cpu(), visible), wanted)
        return logits[0], new_state if more else None

    def take_columns(self, state: list[LayerState], columns: Tensor) -> list[LayerState]:
        return [LayerState(*(part[:, :, columns] for part in layer)) for layer in state]

    def join_columns(self, states: Sequence[list[LayerState]]) -> list[LayerState]:
        layers = zip(*states, strict=True)
        return [LayerState(*(torch.cat(parts, dim=2) for parts in zip(*same, strict=True))) for same in layers]


def angles(positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [t, e / 2] of positions [t] * 10000 ** (-2 i / e) radians for pairs i, with the dtype of `like` [..., e]."""
    e = like.shape[-1]
    # In float64: a float32 angle at position one million is off by 0.06 radians.
    radians = positions[:, None] * 10_000.0 ** (-torch.arange(0, e, 2, dtype=torch.float64) / e)
    wide = torch.promote_types(like.dtype, torch.float32)
    return radians.cos().to(wide).to(like.device), radians.sin().to(wide).to(like.device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + e / 2) of x [..., t, e] by the angles with these cos and sin [t, e / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention [b, h, t, e] of each query to itself and the `window - 1` tokens before it.

    q is [b, h, t, e]; k and v are [b, h, s + t, e] with s < window tokens from the state. Blocks of `window` queries are read
    with the keys that they can see.
    """
    b, t = q.shape[0], q.shape[2]
    missing = window - 1 - (k.shape[2] - t)  # positions before the first token
    block = min(window, t)
    blocks, span = -(-t // block), block + window - 1
    spare = blocks * block - t  # padding of the last block, dropped at the end
    q = F.pad(q, (0, 0, 0, spare)).view(b, -1, blocks, block, q.shape[-1])
    k, v = (F.pad(x, (0, 0, missing, spare)).unfold(2, span, block).mT for x in (k, v))  # [b, h, blocks, span, e]

    positions = torch.arange(span)
    age = positions[window - 1 :, None] - positions
    real = block * torch.arange(blocks)[:, None] + positions >= missing
    visible = ((age >= 0) & (age < window) & real[:, None]).to(q.device)  # [blocks, block, span]

    cos, sin = angles(positions, q)
    q, k = rotate(q, cos[window - 1 :], sin[window - 1 :]), rotate(k, cos, sin)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # blocks become rows: fused kernels take four axes
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.repeat(b, 1, 1)[:, None])
    return mixed.view(b, blocks, *mixed.shape[1:]).transpose(1, 2).flatten(2, 3)[:, :, :t]


def load(window: int | None = None) -> Transformer:
    """Full attention: exact for any chunking, and its state grows with the text. Random weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed accelerators too
        return Transformer(window=window).eval()


def load_windowed() -> Transformer:
    """The same weights with a window of 64 tokens: exact for any chunking, with a constant state."""
    return load(window=64)
