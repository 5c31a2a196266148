"""`moshi`: a small Moshi, which reads speech and text as frames of 17 codes.

Codebook 0 is the text that the model speaks, 1 to 8 are its own voice, 9 to 16 the voice it listens to. Two transformers:

* the temporal one reads a frame as the sum of its 17 embeddings, and sees the last `context` frames;
* the depth one, which starts fresh in each frame, reads the text and the first seven codes of the frame, with separate weights
  for each, and predicts the code after each: the eight codes of the model's own voice.

The input is undelayed; the model reads the last seven codes of each voice one frame later (`DELAYS`), and its logits at a
position predict the codes that are read there:

    frame     0   1   2   3                   position  0   1   2   3
      code 1  a0  a1  a2  a3    is read as      code 1  a0  a1  a2  a3
      code 2  b0  b1  b2  b3                    code 2  --  b0  b1  b2       -- is the initial token of a codebook

Shapes: b rows, t frames, k codebooks, s scored ones, d width, h heads, e = d / h, c context.

Defossez et al., "Moshi: a speech-text foundation model for real-time dialogue", 2024 (4096 wide, 32 layers, 3000 frames).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOICE = 8  # codebooks of a voice
DELAYS = (0, 0, *[1] * (VOICE - 1), 0, *[1] * (VOICE - 1))


class Codebooks(NamedTuple):
    """Entries of each [k], indices of the scored ones [s] and their delays in frames [s], and whether a code may be -1."""

    sizes: tuple[int, ...]
    scored: tuple[int, ...]
    delays: tuple[int, ...]
    gaps: bool = True


class State(NamedTuple):
    """The state of the model."""

    recent: Tensor  # [b, k, longest delay + 1]  the last frames, undelayed
    rings: list[Tensor]  # [2, b, h, c, e] of each layer: the last keys and values, frame n at index n modulo c
    seen: int  # frames read


class Embedding(nn.Module):
    """Vectors [b, k, t, d] of codes [b, k, t], with separate entries for each codebook; zeros for -1, no code."""

    def __init__(self, sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        ends = torch.tensor([0, *[size + 1 for size in sizes]]).cumsum(0)  # one more entry for the initial token
        self.table = nn.Embedding(int(ends[-1]), width)
        self.first = nn.Buffer(ends[:-1, None])

    def forward(self, codes: Tensor) -> Tensor:
        vectors: Tensor = self.table((self.first + codes).clamp(min=0))
        return vectors * (codes >= 0)[..., None]


class PerStep(nn.Module):
    """A linear map with separate weights for each of its s steps: [..., s, d] -> [..., s, out]."""

    def __init__(self, width: int, out: int, steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(steps, width, out) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...si,sio->...so", x, self.weight)


class Block(nn.Module):
    """A causal transformer layer; with `steps`, it has separate weights for each step."""

    def __init__(self, width: int, heads: int, hidden: int, steps: int = 0) -> None:
        super().__init__()
        linear = partial(PerStep, steps=steps) if steps else partial(nn.Linear, bias=False)
        self.heads, self.qkv, self.out = heads, linear(width, 3 * width), linear(width, width)
        self.gate_up, self.down = linear(width, 2 * hidden), linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, F.scaled_dot_product_attention(*self.project(x), is_causal=True))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [b, h, t, e] of [b, t, d]."""
        q, k, v = self.qkv(norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(norm(x)).chunk(2, dim=-1)
        return torch.add(x, self.down(F.silu(gate) * up))


class Temporal(nn.Module):
    """A layer over frames, whose attention sees the frame itself and the `context - 1` before it.

    A chunk reads the ring buffer before it writes, since its first frames still see what its last ones overwrite.
    """

    def __init__(self, width: int, heads: int, hidden: int, context: int) -> None:
        super().__init__()
        self.block, self.context = Block(width, heads, hidden), context

    def forward(self, x: Tensor, ring: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        q, k, v = self.block.project(x)
        q, k = rotate(torch.stack([q, k]), seen)
        read = torch.stack([k, v])
        new = seen + torch.arange(x.shape[1], device=x.device)
        attended = self.attend(q, torch.cat([ring, read], dim=3), new)
        newest = slice(-self.context, None)
        return self.block.finish(x, attended), ring.index_copy(3, new[newest] % self.context, read[:, :, :, newest])

    def attend(self, q: Tensor, known: Tensor, new: Tensor) -> Tensor:
        """Attention of the frames `new` to keys and values `known` [2, b, h, c + t, e], of the ring buffer and their own."""
        last = new[0] - 1
        held = last - (last - torch.arange(self.context, device=q.device)) % self.context  # negative: still empty
        frames = torch.cat([held, new])
        age = new[:, None] - frames
        visible = (frames >= 0) & (age >= 0) & (age < self.context)
        return F.scaled_dot_product_attention(q, known[0], known[1], attn_mask=visible)


class Depth(nn.Module):
    """A transformer over the codes of a frame, without positions or state; all frames of a chunk at once."""

    def __init__(self, from_width: int, width: int, heads: int, layers: int, card: int, text_card: int) -> None:
        super().__init__()
        self.enter = PerStep(from_width, width, VOICE)
        self.embed = Embedding((text_card, *[card] * (VOICE - 1)), width)
        self.layers = nn.ModuleList(Block(width, heads, 2 * width, steps=VOICE) for _ in range(layers))
        self.exit = PerStep(width, card, VOICE)

    def forward(self, hidden: Tensor, frames: Tensor) -> Tensor:
        """Logits [b, s, t, card] for the codes of `frames` [b, k, t], from `hidden` [b, t, d] of the frames before each."""
        before = self.embed(frames[:, :VOICE]).transpose(1, 2)
        x = (self.enter(hidden[:, :, None].expand(-1, -1, VOICE, -1)) + before).flatten(0, 1)  # [b * t, s, d]: a frame is a row
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.exit(norm(x)).unflatten(0, hidden.shape[:2])
        return logits.transpose(1, 2)


class Moshi(nn.Module):
    """Frames of 17 codes in, logits of the eight codes of its own voice out; see the module docstring."""

    constant_state = True

    def __init__(
        self, width: int = 64, layers: int = 2, heads: int = 4, context: int = 32, card: int = 64, text_card: int = 128
    ) -> None:
        super().__init__()
        self.codebooks = Codebooks((text_card, *[card] * 2 * VOICE), tuple(range(1, 1 + VOICE)), DELAYS[1 : 1 + VOICE])
        self.embed = Embedding(self.codebooks.sizes, width)
        self.layers = nn.ModuleList(Temporal(width, heads, 2 * width, context) for _ in range(layers))
        self.ring_shape = (heads, context, width // heads)
        self.depth = Depth(width, width // 2, heads // 2, layers, card, text_card)

    def forward(self, codes: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits [b, 8, t, card] for the frames `codes` [b, 17, t] themselves, and the new state."""
        recent, rings, seen = state or self.beginning(codes.shape[0])
        recent = torch.cat([recent, codes], dim=2)
        end, t = recent.shape[2], codes.shape[2] + 1
        delayed = torch.stack([recent[:, k, end - delay - t : end - delay] for k, delay in enumerate(DELAYS)], dim=1)
        x = self.embed(delayed[:, :, :-1]).sum(1)
        new_rings = []
        for layer, ring in zip(self.layers, rings, strict=True):
            x, ring = layer(x, ring, seen)
            new_rings.append(ring)
        logits = self.depth(norm(x), delayed[:, :, 1:])
        recent = recent[:, :, -1 - max(DELAYS) :].clone()  # a slice would keep the whole chunk in memory
        return logits, State(recent, new_rings, seen + codes.shape[2])

    def beginning(self, rows: int) -> State:
        """The state before the first frame: the initial token of each codebook is the entry after its last."""
        weight = next(self.parameters())
        initial = torch.tensor(self.codebooks.sizes, device=weight.device)[None, :, None]
        empty = weight.new_zeros(2, rows, *self.ring_shape)
        return State(initial.expand(rows, -1, 1 + max(DELAYS)), [empty for _ in self.layers], 0)

    @staticmethod
    def recent(state: State) -> Tensor:
        """[b, k, n] the frames read last, whose delayed codes are not predicted yet."""
        return state.recent


def norm(x: Tensor) -> Tensor:
    """Root mean square norm over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x: Tensor, seen: int) -> Tensor:
    """RoPE: each pair of coordinates of [..., t, e] is rotated by an angle proportional to its frame (Su et al. 2021)."""
    half = x.shape[-1] // 2
    frames = torch.arange(seen, seen + x.shape[-2], dtype=torch.float64)  # float32 is too coarse for late frames
    angles = frames[:, None] * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


def load() -> Moshi:
    """Random weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Moshi().eval()
