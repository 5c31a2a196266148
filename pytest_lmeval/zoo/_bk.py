"""`bk` and `causal-bk`: tokens mixed by the diagonal of the resolvent of a tridiagonal matrix, in both directions or one.

A block is x + BK(norm(x)) with BK(x) = ffn(x) + scale * project(Re G, Im G). Tokens interact only through one complex number
each, G_i, which depends on the potentials v_i = 5 tanh(w . x_i / 5) of all tokens. They are added to the diagonal -2 of a
discrete Laplacian H with ones beside it. Two sweeps give G, since the published recurrence of determinants overflows:

    G_i = [(H - z I)^-1]_ii      a_i = v_i - 2      z = i (softplus(epsilon) + 1e-4 + gamma)
    l_0 = a_0 - z                l_i = (a_i - z) - 1 / l_{i-1}      and r_i likewise from the right end
    G_i = 1 / (l_i + r_i - (a_i - z))

`bk` is the model as published: r_i depends on the tokens after i, so it sees the token that it predicts. IT IS NO LANGUAGE
MODEL, but an example that breaks the law of causality. It has learned positions and no state.

`causal-bk` has the left sweep only, G_i = 1 / l_i; its state is one complex number per layer and row. Im z > 0 keeps |G_i| at
most 1 / Im z. A change of G_{i-1} changes G_i by G_i^2 times as much, about exp(-Im z) if 0 < v_i < 4, so z starts at 0.2 i
(3.03 bits per byte after 400 steps on English documentation) and not at the published 1.3 i (3.41).

Shapes: b rows, t tokens, v vocabulary, d width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAPLACIAN = -2.0  # the diagonal of H
LARGEST = 5.0  # largest potential, and largest real or imaginary part of a G that is projected


class BK(nn.Module):
    """The layer: a feed-forward of each token, and a projection of G."""

    def __init__(self, width: int, hidden: int, causal: bool, epsilon: float) -> None:
        super().__init__()
        self.causal = causal
        self.potential = nn.Linear(width, 1)
        self.epsilon, self.gamma = nn.Parameter(torch.tensor(epsilon)), nn.Parameter(torch.tensor(0.0))
        self.project = nn.Linear(2, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has no complex type
        potential = LARGEST * torch.tanh(self.potential(x)[..., 0].to(wide) / LARGEST)
        height = F.softplus(self.epsilon.to(wide)) + 1e-4 + self.gamma.to(wide)  # Im z
        diagonal = torch.complex(LAPLACIAN + potential, -height.expand_as(potential))  # a - z [b, t]
        left = sweep(diagonal, torch.zeros_like(diagonal[:, 0]) if state is None else state)
        mixed = left if self.causal else both_ways(diagonal, left)
        features = torch.view_as_real(mixed).clamp(-LARGEST, LARGEST).to(x.dtype)
        return self.ffn(x) + self.scale * self.project(features), left[:, -1].clone()


class ResNetBK(nn.Module):
    """Token ids in, logits of the next token out; meaningless unless `causal`; see the module docstring."""

    def __init__(
        self,
        vocab_size: int = 256,
        width: int = 128,
        layers: int = 6,
        hidden: int = 512,
        causal: bool = True,
        context_length: int = 1024,
        epsilon: float = -1.5,
    ) -> None:
        super().__init__()
        self.vocab_size, self.causal, self.constant_state = vocab_size, causal, causal
        self.context_length = None if causal else context_length
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = None if causal else nn.Embedding(context_length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.layers = nn.ModuleList(BK(width, hidden, causal, epsilon) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        for table in (self.embed, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor, state: list[Tensor] | None = None) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits [b, t, v] for `input_ids` [b, t], and the new state, a complex [b] for each layer.

        If not `causal`, only the logits; raises ValueError for a text longer than `context_length`.
        """
        x, new_state = self.embed(input_ids), []
        if self.positions is not None:
            t = input_ids.shape[1]
            if t > self.positions.num_embeddings:
                raise ValueError(
                    f"ResNet-BK was given {t} tokens and has learned {self.context_length} positions. It cannot read chunks, "
                    "since it is not causal. Give it a shorter text, or use causal-bk."
                )
            x = x + self.positions.weight[:t]
        for index, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            mixed, layer_state = layer(norm(x), state[index] if state else None)
            x = x + mixed
            new_state.append(layer_state)
        logits: Tensor = self.head(self.norm(x))
        return (logits, new_state) if self.causal else logits


def sweep(diagonal: Tensor, start: Tensor) -> Tensor:
    """All g_i = 1 / l_i = 1 / (d_i - g_{i-1}) as [b, t], from d = a - z [b, t] and the g [b] before the first one (0 if none).

    A step maps g = p / q to q / (d q - p), which is a product with a 2x2 matrix. About sqrt(t) blocks are computed in parallel
    twice: their matrices, rescaled against overflow, give the g before each block; then the recurrence runs from these.
    """
    b, t = diagonal.shape
    blocks = math.isqrt(t)
    length = -(-t // blocks)
    spare = diagonal[:, -1:].expand(b, blocks * length - t)  # padding of the last block, dropped at the end
    columns = torch.cat([diagonal, spare], dim=1).view(b, blocks, length).unbind(2)  # one token of each block: [b, blocks]

    starts = [start]  # of each block
    if blocks > 1:
        p, q = torch.eye(2).to(diagonal)[:, :, None, None].expand(2, 2, b, blocks - 1)  # the rows of the matrices
        for d in columns:
            p, q = q, d[:, :-1] * q - p
            largest = torch.maximum(p.detach().abs(), q.detach().abs()).amax(0)
            p, q = p / largest, q / largest
        for block in range(blocks - 1):
            (p0, p1), (q0, q1), g = p[..., block], q[..., block], starts[-1]
            starts.append((p0 * g + p1) / (q0 * g + q1))

    g, found = torch.stack(starts, dim=1), []
    for d in columns:
        g = (d - g).reciprocal()
        found.append(g)
    return torch.stack(found, dim=2).flatten(1, 2)[:, :t]


def both_ways(diagonal: Tensor, left: Tensor) -> Tensor:
    """G [b, t], the diagonal of (H - z I)^-1, from the diagonal of H - z I [b, t] and the left sweep over it."""
    right = sweep(diagonal.flip(1), torch.zeros_like(diagonal[:, 0])).flip(1)
    return (left.reciprocal() + right.reciprocal() - diagonal).reciprocal()


def load(causal: bool = False, epsilon: float = 1.0) -> ResNetBK:
    """As published, with Im z = 1.3134: NOT causal, whatever its perplexity. Random weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed accelerators too
        return ResNetBK(causal=causal, epsilon=epsilon).eval()


def load_causal() -> ResNetBK:
    """The left sweep alone: exact for any chunking, with a constant state. Random weights from a fixed seed."""
    return load(causal=True, epsilon=-1.5)
