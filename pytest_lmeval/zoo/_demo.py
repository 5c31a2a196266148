"""`demo`: a small trained byte-level language model, the default.

A transformer over bytes with windowed attention. Its state does not grow, and texts of any length are read exactly:

* a query sees itself and the `window - 1` bytes before it, so the state of a layer is the last `window - 1` keys and values,
  and the last `kernel - 1` inputs of its convolution;
* only the distance between bytes enters (ALiBi: a linear penalty with a slope for each head), no absolute position.

Shapes: b rows, t bytes, d width, h heads, e = d / h, w window, k kernel.

Trained by `benchmarks/train_demo.py` on the training split of the corpus `stdlib`.
ALiBi: Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("demo.safetensors")


class LayerState(NamedTuple):
    """The state of a layer."""

    tail: Tensor  # [b, k - 1, d]      the convolution's last inputs
    keys: Tensor  # [b, h, w - 1, e]
    values: Tensor  # [b, h, w - 1, e]
    seen: int  # how many of the keys are real, at most w - 1; those before are padding


class Layer(nn.Module):
    """A convolution over the last `kernel` inputs, windowed attention, and a gated feed-forward."""

    def __init__(self, width: int, heads: int, window: int, kernel: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.window, self.kernel = heads, window, kernel
        self.mix = nn.Conv1d(width, width, kernel, groups=width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        b, t, d = x.shape
        tail, keys, values, seen = state or self.blank(x)

        recent = torch.cat([tail, norm(x)], dim=1)  # [b, k - 1 + t, d]
        mixed = self.mix(recent.transpose(1, 2)).transpose(1, 2)  # [b, t, d], causal
        q, k, v = self.qkv(mixed).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        keys, values = torch.cat([keys, norm(k)], dim=2), torch.cat([values, v], dim=2)
        attended = banded_attention(norm(q), keys, values, self.window, seen)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))

        gate, up = self.gate_up(norm(x)).chunk(2, dim=-1)
        x = x + self.down(F.silu(gate) * up)
        # clone: a slice would keep the whole chunk in memory
        tail, keys, values = recent[:, t:].clone(), keys[:, :, t:].clone(), values[:, :, t:].clone()
        return x, LayerState(tail, keys, values, min(seen + t, self.window - 1))

    def blank(self, x: Tensor) -> LayerState:
        b, _, d = x.shape
        past = x.new_zeros(b, self.heads, self.window - 1, d // self.heads)
        return LayerState(x.new_zeros(b, self.kernel - 1, d), past, past, 0)


class Demo(nn.Module):
    """Bytes in, logits of the next byte out; see the module docstring."""

    vocab_size = 256

    def __init__(
        self, width: int = 128, layers: int = 5, heads: int = 4, window: int = 256, kernel: int = 4, hidden: int = 320
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.vocab_size, width)
        self.layers = nn.ModuleList(Layer(width, heads, window, kernel, hidden) for _ in range(layers))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, input_ids: Tensor, state: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Logits [b, t, 256] of the byte after each of `input_ids` [b, t], and the new state."""
        x, new_state = norm(self.embed(input_ids)), []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, state[index] if state else None)
            new_state.append(layer_state)
        return norm(x) @ self.embed.weight.T, new_state


def norm(x: Tensor) -> Tensor:
    """Root mean square norm over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int, seen: int, block: int = 128) -> Tensor:
    """Attention of each query to itself and the `window - 1` positions before it.

    q is [b, h, t, e]; k and v are [b, h, window - 1 + t, e], of which the first `window - 1` come from the state, and the last
    `seen` of these are real. Queries are read in blocks, each with the keys that it can see, so the cost is linear in t.
    """
    b, h, t, e = q.shape
    block = min(block, t)
    blocks = -(-t // block)
    spare = blocks * block - t  # padding of the last block, dropped at the end
    span = block + window - 1
    q = F.pad(q, (0, 0, 0, spare)).view(b, h, blocks, block, e)
    k, v = (F.pad(x, (0, 0, 0, spare)).unfold(2, span, block).transpose(-1, -2) for x in (k, v))

    ages = torch.arange(block, device=q.device)[:, None] + window - 1 - torch.arange(span, device=q.device)
    slopes = 4.0 ** -torch.arange(1, h + 1, device=q.device, dtype=q.dtype)
    bias = -slopes[:, None, None] * ages  # [h, block, span]
    bias = bias.masked_fill((ages < 0) | (ages >= window), float("-inf"))
    if seen < window - 1:  # some keys are padding from before the first byte
        starts = block * torch.arange(blocks, device=q.device)[:, None] + torch.arange(span, device=q.device)
        blank = starts < window - 1 - seen
        bias = bias[:, None].masked_fill(blank[:, None], float("-inf"))  # [h, blocks, block, span]
    else:
        bias = bias[:, None].expand(h, blocks, block, span)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=e**-0.5 * 4)
    return out.reshape(b, h, -1, e)[:, :, :t]


def load() -> Demo:
    """The trained model, in float32 (its weights are stored in half precision)."""
    from safetensors.torch import load_file

    model = Demo()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return model.eval()
