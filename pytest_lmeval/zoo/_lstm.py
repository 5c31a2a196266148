"""`lstm`: a long short-term memory network. Each layer is x + LSTM(norm(x)), where `nn.LSTM` computes for each token

    i, f, o = sigmoid(W x_t + U h_{t-1} + b)         input, forget and output gates
    c_t = f * c_{t-1} + i * tanh(W' x_t + U' h_{t-1} + b')
    h_t = o * tanh(c_t)

Shapes: b rows, t tokens, v vocabulary, d width.

Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 1997; the gate f: Gers et al., 2000.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class LayerState(NamedTuple):
    """The state of a layer, as `nn.LSTM` takes and returns it."""

    hidden: Tensor  # [1, b, d]  h
    cell: Tensor  # [1, b, d]    c


class Layer(nn.Module):
    """One `nn.LSTM` with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        y, (hidden, cell) = self.lstm(self.norm(x), state)
        return x + y, LayerState(hidden.clone(), cell.clone())  # clone: they may be views of the whole chunk


class LSTM(nn.Module):
    """Tokens in, logits of the next token out; see the module docstring."""

    constant_state = True

    def __init__(self, vocab_size: int = 256, width: int = 160, layers: int = 4) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, input_ids: Tensor, state: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Logits [b, t, v] of the token after each of `input_ids` [b, t], and the new state."""
        x, new_state = self.embed(input_ids), []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, state[index] if state else None)
            new_state.append(layer_state)
        return self.norm(x) @ self.embed.weight.T, new_state


def load() -> LSTM:
    """Exact for any chunking, with a constant state. Random weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed accelerators too
        return LSTM().eval()
