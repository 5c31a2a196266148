"""`bk` and `causal-bk`: tokens mixed by the diagonal of a tridiagonal matrix's resolvent, both ways or one way.

A block is x + BK(norm(x)), and BK(x) = ffn(x) + scale * project(Re G, Im G). All that a token learns of the others is one
complex number, G_i. All that it tells them is its potential v_i = 5 tanh(w . x_i / 5), on the diagonal of a matrix H that is a
discrete Laplacian otherwise (h0 = -2 on the diagonal, b = c = 1 beside it):

    G_i = [(H - z I)^-1]_ii      a_i = h0 + v_i      z = i (softplus(epsilon) + 1e-4 + gamma)

Two sweeps give it; the recurrence of determinants, as published, overflows:

    l_0 = a_0 - z      l_i = (a_i - z) - b c / l_{i-1}      and r_i alike from the right end
    G_i = 1 / (l_i + r_i - (a_i - z))

`bk` is the model as published. r_i is made of the tokens after i, so it sees the token that it is to predict: IT IS NO LANGUAGE
MODEL, and its perplexities say nothing. It is here for the law of causality to refuse. It has learned positions, no state, and
reads one text of at most `context_length` tokens.

`causal-bk` has the left sweep alone, G_i = 1 / l_i, and no positions; its state is one complex number a layer and row. Since
Im z > 0, Im l_i <= -Im z at every i: nothing is divided by zero, and |G_i| <= 1 / Im z. A change of G_{i-1} moves G_i by G_i^2
times as much, which is about exp(-Im z) in the middle of the band (0 < v_i < 4), and less beside it, where a token can have all
before it forgotten. So z begins at 0.2 i here, not at the published 1.3 i. (400 steps on bytes of English documentation end at
3.03 bits a byte from 0.1 i and 0.2 i, 3.01 from 0.3 i and 0.5 i, and 3.41 from 1.3 i.)

Shapes: b rows, t tokens, v vocabulary, d width.

    logits, state = causal(input_ids)                # [b, t] -> [b, t, v]
    logits, state = causal(more_ids, state)          # goes on where the first call ended
    logits = published(input_ids)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAPLACIAN = -2.0  # h0; b c is 1 wherever it would stand below
LARGEST = 5.0  # potential, and part of a G that is passed on


class BK(nn.Module):
    """The layer: what a token is by itself, and what the others make of it."""

    def __init__(self, width: int, hidden: int, causal: bool, epsilon: float) -> None:
        super().__init__()
        self.causal = causal
        self.potential = nn.Linear(width, 1)
        self.epsilon, self.gamma = nn.Parameter(torch.tensor(epsilon)), nn.Parameter(torch.tensor(0.0))
        self.project = nn.Linear(2, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has no complex numbers
        potential = LARGEST * torch.tanh(self.potential(x)[..., 0].to(wide) / LARGEST)
        height = F.softplus(self.epsilon.to(wide)) + 1e-4 + self.gamma.to(wide)  # Im z
        diagonal = torch.complex(LAPLACIAN + potential, -height.expand_as(potential))  # a - z [b, t]
        left = sweep(diagonal, torch.zeros_like(diagonal[:, 0]) if state is None else state)
        mixed = left if self.causal else both_ways(diagonal, left)
        features = torch.view_as_real(mixed).clamp(-LARGEST, LARGEST).to(x.dtype)
        return self.ffn(x) + self.scale * self.project(features), left[:, -1].clone()


class ResNetBK(nn.Module):
    """Tokens in, logits out: of the next token if `causal`, and of nothing meaningful if not; see the head of this file."""

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
        """Logits [b, t, v] for `input_ids` [b, t], and the state to go on from: a complex [b] of each layer.

        If not `causal`, the logits alone, and ValueError for a text longer than `context_length`.
        """
        x, new_state = self.embed(input_ids), []
        if self.positions is not None:
            x = x + self.positions(self.places(input_ids))
        for index, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            mixed, layer_state = layer(norm(x), state[index] if state else None)
            x = x + mixed
            new_state.append(layer_state)
        logits: Tensor = self.head(self.norm(x))
        return (logits, new_state) if self.causal else logits

    def places(self, input_ids: Tensor) -> Tensor:
        t = input_ids.shape[1]
        if self.context_length is not None and t > self.context_length:
            raise ValueError(
                f"ResNet-BK was given {t} tokens and has learned {self.context_length} positions. It looks both ways, so what "
                "is longer cannot be read in parts either. Give it at most so many, or use causal-bk."
            )
        return torch.arange(t, device=input_ids.device)


def sweep(diagonal: Tensor, start: Tensor) -> Tensor:
    """All g_i = 1 / l_i = 1 / (d_i - g_{i-1}) as [b, t], from d = a - z [b, t] and the g [b] before the first one (0 if none).

    A step takes g = p / q to q / (d q - p): a product with a 2x2 matrix, and so is a block of steps. The text is cut into about
    sqrt(t) blocks that are read side by side, twice: for their matrices, and then, each from what the matrices before it
    make of `start`, by the recurrence itself. A matrix that is scaled means the same, so they are kept from overflowing.
    """
    b, t = diagonal.shape
    blocks = math.isqrt(t)
    length = -(-t // blocks)
    spare = diagonal[:, -1:].expand(b, blocks * length - t)  # fills up the last block; what it computes there is dropped
    places = torch.cat([diagonal, spare], dim=1).view(b, blocks, length).unbind(2)  # a token of every block: [b, blocks]

    starts = [start]  # of each block
    if blocks > 1:
        p, q = torch.eye(2).to(diagonal)[:, :, None, None].expand(2, 2, b, blocks - 1)  # the rows of the matrices
        for d in places:
            p, q = q, d[:, :-1] * q - p
            largest = torch.maximum(p.detach().abs(), q.detach().abs()).amax(0)
            p, q = p / largest, q / largest
        for block in range(blocks - 1):
            (p0, p1), (q0, q1), g = p[..., block], q[..., block], starts[-1]
            starts.append((p0 * g + p1) / (q0 * g + q1))

    g, found = torch.stack(starts, dim=1), []
    for d in places:
        g = (d - g).reciprocal()
        found.append(g)
    return torch.stack(found, dim=2).flatten(1, 2)[:, :t]


def both_ways(diagonal: Tensor, left: Tensor) -> Tensor:
    """G [b, t], the diagonal of the inverse of H - z I, from its own diagonal [b, t] and the left sweep over that."""
    right = sweep(diagonal.flip(1), torch.zeros_like(diagonal[:, 0])).flip(1)
    return (left.reciprocal() + right.reciprocal() - diagonal).reciprocal()


def load() -> ResNetBK:
    """As published, with Im z = 1.3134: NOT causal, whatever perplexity it reaches. Random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of accelerators too
        return ResNetBK(causal=False, epsilon=1.0).eval()


def load_causal() -> ResNetBK:
    """The left sweep alone: exact for any chunking, with a constant state. Random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of accelerators too
        return ResNetBK().eval()
