"""A small Moshi: speech and text as frames of 17 codes, read one frame after the other, and the codes of a frame in turn.

Codebook 0 is the text that the model speaks, 1 to 8 are its own voice, 9 to 16 the voice it listens to. Two transformers:

* the temporal one reads a frame as the sum of its 17 embeddings, and sees the `context` frames up to it;
* the depth one, begun anew in each frame, reads the text and the first seven codes of the frame, each with weights of its
  own, and predicts the code after each: the eight codes of the model's own voice.

The first code of a voice says what was spoken, the other seven how; these are read one frame later (`DELAYS`), when all of
what was said is known. What is read at a place is therefore not one frame:

    frame 0   1   2   3                        place 0   1   2   3
      0   a0  a1  a2  a3    is read as           0   a0  a1  a2  a3
      1   b0  b1  b2  b3                         1   --  b0  b1  b2       -- is the initial token of a codebook

It is given frames as they were spoken, and what it says at a place is about what is read there:

    logits, state = model(codes)                     # [b, 17, t] -> [b, 8, t, card]
    logits, state = model(more_codes, state)         # goes on where the first call ended

The state does not grow: the last frames, and in each layer a ring of the last `context` keys and values. A ring that is
written before it is read has lost, in a chunk of several frames, what the first should still see; this one is read first.

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
    """Entries of each [k], which are scored [s], by how many frames those are delayed [s], and that a code may be missing."""

    sizes: tuple[int, ...]
    scored: tuple[int, ...]
    delays: tuple[int, ...]
    gaps: bool = True


class State(NamedTuple):
    """What is carried from chunk to chunk."""

    recent: Tensor  # [b, k, longest delay + 1]  the last frames as they were given
    rings: list[Tensor]  # [2, b, h, c, e] of each layer: the last keys and values, those of frame n at n modulo c
    seen: int  # frames read


class Embedding(nn.Module):
    """Vectors [b, k, t, d] of codes [b, k, t], each codebook with entries of its own; zeros in place of -1, for no code."""

    def __init__(self, sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        ends = torch.tensor([0, *[size + 1 for size in sizes]]).cumsum(0)  # the initial token is one more entry
        self.table = nn.Embedding(int(ends[-1]), width)
        self.first = nn.Buffer(ends[:-1, None])

    def forward(self, codes: Tensor) -> Tensor:
        vectors: Tensor = self.table((self.first + codes).clamp(min=0))
        return vectors * (codes >= 0)[..., None]


class PerStep(nn.Module):
    """A linear map with other weights at each of its s steps: [..., s, d] -> [..., s, out]."""

    def __init__(self, width: int, out: int, steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(steps, width, out) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...si,sio->...so", x, self.weight)


class Block(nn.Module):
    """A transformer layer whose attention sees what came before; with `steps`, weights of its own for each step."""

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
    """From frame to frame: a layer whose attention sees the frame itself and the `context - 1` before it."""

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
        """What the frames `new` see of the ring and of each other: `known` keys and values [2, b, h, c + t, e]."""
        last = new[0] - 1
        held = last - (last - torch.arange(self.context, device=q.device)) % self.context  # negative: still empty
        frames = torch.cat([held, new])
        age = new[:, None] - frames
        visible = (frames >= 0) & (age >= 0) & (age < self.context)
        return F.scaled_dot_product_attention(q, known[0], known[1], attn_mask=visible)


class Depth(nn.Module):
    """From code to code within a frame: no place, no memory; all frames of a chunk at once."""

    def __init__(self, from_width: int, width: int, heads: int, layers: int, card: int, text_card: int) -> None:
        super().__init__()
        self.enter = PerStep(from_width, width, VOICE)
        self.embed = Embedding((text_card, *[card] * (VOICE - 1)), width)
        self.layers = nn.ModuleList(Block(width, heads, 2 * width, steps=VOICE) for _ in range(layers))
        self.exit = PerStep(width, card, VOICE)

    def forward(self, hidden: Tensor, frames: Tensor) -> Tensor:
        """Logits [b, s, t, card] about the codes of `frames` [b, k, t]; `hidden` [b, t, d] knows the frames before each."""
        before = self.embed(frames[:, :VOICE]).transpose(1, 2)
        x = (self.enter(hidden[:, :, None].expand(-1, -1, VOICE, -1)) + before).flatten(0, 1)  # [b * t, s, d]: a frame is a row
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.exit(norm(x)).unflatten(0, hidden.shape[:2])
        return logits.transpose(1, 2)


class Moshi(nn.Module):
    """Frames of 17 codes in, logits of the eight codes of its own voice out; see the head of this file."""

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
        """Logits [b, 8, t, card] about the frames `codes` [b, 17, t] themselves, and the state to go on from."""
        recent, rings, seen = state or self.beginning(codes.shape[0])
        recent = torch.cat([recent, codes], dim=2)
        delayed = self.delay(recent, codes.shape[2] + 1)
        x = self.embed(delayed[:, :, :-1]).sum(1)
        turned = []
        for layer, ring in zip(self.layers, rings, strict=True):
            x, ring = layer(x, ring, seen)
            turned.append(ring)
        logits = self.depth(norm(x), delayed[:, :, 1:])
        recent = recent[:, :, -1 - max(DELAYS) :].clone()  # a slice would keep the memory of the whole chunk alive
        return logits, State(recent, turned, seen + codes.shape[2])

    def delay(self, frames: Tensor, places: int) -> Tensor:
        """[b, k, places] what is read at the last so many places of `frames`."""
        end = frames.shape[2]
        return torch.stack([frames[:, k, end - delay - places : end - delay] for k, delay in enumerate(DELAYS)], dim=1)

    def beginning(self, rows: int) -> State:
        """Before the first frame, each codebook holds its initial token: the entry after its last."""
        weight = next(self.parameters())
        initial = torch.tensor(self.codebooks.sizes, device=weight.device)[None, :, None]
        empty = weight.new_zeros(2, rows, *self.ring_shape)
        return State(initial.expand(rows, -1, 1 + max(DELAYS)), [empty for _ in self.layers], 0)

    @staticmethod
    def recent(state: State) -> Tensor:
        """[b, k, n] the frames read last: not all of their codes were predicted yet."""
        return state.recent


def norm(x: Tensor) -> Tensor:
    """Root mean square norm over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x: Tensor, seen: int) -> Tensor:
    """RoPE: each pair of entries of [..., t, e] turned by an angle that grows with its frame (Su et al. 2021)."""
    half = x.shape[-1] // 2
    places = torch.arange(seen, seen + x.shape[-2], dtype=torch.float64)  # float32 would lose the angles of late frames
    angles = places[:, None] * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


def load() -> Moshi:
    """A model with random weights, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Moshi().eval()
