"""`bk` and `causal-bk`: tokens mixed by the diagonal of a tridiagonal resolvent, both ways or one way.

A block is x + BK(norm(x)), and BK(x) = ffn(x) + scale * project(Re G, Im G), where each token is mixed with the others through
one number a token, the potential v_i = 5 tanh(w . x_i / 5). It stands on the diagonal of a matrix H whose neighbours of the
diagonal are b = c = 1, as in a discrete Laplacian (h0 = -2), and

    a_i = h0 + v_i,   G_i = [(H - z I)^-1]_ii,   z = i (softplus(epsilon) + 1e-4 + gamma)

Two sweeps give G stably (the recurrence of determinants, as published, overflows):

    l_0 = a_0 - z,    l_i = (a_i - z) - b c / l_{i-1}         from the left, and r_i alike from the right
    G_i = 1 / (l_i + r_i - (a_i - z))

`bk` is the model as published. r_i is made of the tokens after i: it sees the token that it is to predict, so IT IS NO LANGUAGE
MODEL and its perplexities say nothing. It is here for the law of causality to refuse. It has learned positions, no state, and
reads one text of at most `context_length` tokens at a time.

`causal-bk` has the left sweep alone: G_i = 1 / l_i, one complex number of state a layer and row, and no positions. Im z > 0 makes
Im l_i <= -Im z at every i, so no step divides by zero, and |G_i| <= 1 / Im z. How a change of G_{i-1} moves G_i is b c G_i^2,
about exp(-Im z) inside of the band (0 < v_i < 4) and less outside: Im z is how fast it forgets, and a token can make it forget
at once. So z starts at 0.1 i here, not at 1.3 i, where a fifth is left after two tokens.

Shapes: b rows, t tokens, v vocabulary, d width.

    logits, state = causal(input_ids)                # [b, t] -> [b, t, v]
    logits, state = causal(more_ids, state)          # goes on where the first call ended
    logits = published(input_ids)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LAPLACIAN = -2.0  # h0; b c is 1 throughout
STRONGEST = 5.0  # potential, and feature


class BK(nn.Module):
    """The layer: what the token is by itself, and what its neighbours make of it."""

    def __init__(self, width: int, hidden: int, causal: bool, height: float) -> None:
        super().__init__()
        self.causal = causal
        self.potential = nn.Linear(width, 1)
        self.project = nn.Linear(2, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.epsilon = nn.Parameter(torch.tensor(height - 1e-4).expm1().log())  # Im z is `height` at first
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)  # there are no complex numbers of 16 bits
        potential = STRONGEST * torch.tanh(self.potential(x)[..., 0].to(wide) / STRONGEST)
        height = nn.functional.softplus(self.epsilon.to(wide)) + 1e-4 + self.gamma.to(wide)
        diagonal = torch.complex(LAPLACIAN + potential, -height.expand_as(potential))  # a - z [b, t]
        left = sweep(diagonal, torch.zeros_like(diagonal[:, 0]) if state is None else state)
        resolvent = left if self.causal else both_ways(diagonal, left)
        features = torch.view_as_real(resolvent).clamp(-STRONGEST, STRONGEST).to(x.dtype)
        return self.ffn(x) + self.scale * self.project(features), left[:, -1].clone()


class ResNetBK(nn.Module):
    """Tokens in, logits out: of the next token if `causal`, of nothing meaningful if not; see the head of this file."""

    def __init__(
        self,
        vocab_size: int = 256,
        width: int = 128,
        layers: int = 6,
        hidden: int = 512,
        causal: bool = True,
        context_length: int = 1024,
        height: float | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size, self.causal, self.constant_state = vocab_size, causal, causal
        self.context_length = None if causal else context_length
        height = height or (0.1 if causal else math.log1p(math.e) + 1e-4)
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = None if causal else nn.Embedding(context_length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.layers = nn.ModuleList(BK(width, hidden, causal, height) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        for embedding in (self.embed, self.positions):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor, state: list[Tensor] | None = None) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits [b, t, v] after `input_ids` [b, t] and the state to go on from, a complex [b] a layer; if not `causal`, the
        logits only. Raises ValueError for a text longer than `context_length`."""
        x, new_state = self.embed(input_ids), []
        if self.positions is not None:
            x = x + self.positions(self.places(input_ids))
        for index, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            y, layer_state = layer(norm(x), state[index] if state else None)
            x = x + y
            new_state.append(layer_state)
        logits: Tensor = self.head(self.norm(x))
        return (logits, new_state) if self.causal else logits

    def places(self, input_ids: Tensor) -> Tensor:
        t = input_ids.shape[1]
        if t > (self.context_length or t):
            raise ValueError(
                f"a text of {t} tokens was given, and ResNet-BK has learned positions for {self.context_length}. It carries no "
                "state, so a longer text cannot be read in parts either. Give it less, or use causal-bk."
            )
        return torch.arange(t, device=input_ids.device)


def sweep(diagonal: Tensor, start: Tensor) -> Tensor:
    """All g_i = 1 / l_i = 1 / (d_i - g_{i-1}) as [b, t], from d = a - z [b, t] and the g [b] before the first.

    A step maps g = p / q to q / (d q - p), which is a 2x2 matrix, and so is a block of steps. The text is cut into about sqrt(t)
    blocks, which are read side by side twice: for their matrices, and, each begun with what the matrices before it make of
    `start`, by the recurrence itself. A matrix means the same when it is scaled, which keeps it finite.
    """
    b, t = diagonal.shape
    blocks = math.isqrt(t)
    length = -(-t // blocks)
    spare = diagonal[:, -1:].expand(b, blocks * length - t)  # fills up the last block; what it computes there is dropped
    places = torch.cat([diagonal, spare], dim=1).unflatten(1, (blocks, length)).unbind(2)  # of every block one: [b, blocks]

    starts = [start]  # of each block
    if blocks > 1:
        columns = torch.eye(2, dtype=diagonal.dtype, device=diagonal.device)[:, :, None, None]
        p, q = columns.expand(2, 2, b, blocks - 1)
        for d in places:
            p, q = q, d[:, :-1] * q - p
            size = torch.maximum(p.detach().abs(), q.detach().abs()).amax(0)
            p, q = p / size, q / size
        for block in range(blocks - 1):
            (p0, p1), (q0, q1), g = p[..., block], q[..., block], starts[-1]
            starts.append((p0 * g + p1) / (q0 * g + q1))

    g, found = torch.stack(starts, dim=1), []
    for d in places:
        g = (d - g).reciprocal()
        found.append(g)
    return torch.stack(found, dim=2).flatten(1, 2)[:, :t]


def both_ways(diagonal: Tensor, left: Tensor) -> Tensor:
    """G [b, t], the diagonal of the inverse of (H - z I), from its diagonal and the left sweep over it."""
    right = sweep(diagonal.flip(1), torch.zeros_like(diagonal[:, 0])).flip(1)
    return (left.reciprocal() + right.reciprocal() - diagonal).reciprocal()


def load() -> ResNetBK:
    """As published: NOT causal, whatever perplexity it reaches. Random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNetBK(causal=False).eval()


def load_causal() -> ResNetBK:
    """The left sweep alone: exact for any chunking, with a constant state. Random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNetBK(causal=True).eval()
