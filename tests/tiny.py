"""Models of a user: the tests of the plugin copy this file into the projects that they run."""

import torch
from torch import nn


class Tiny(nn.Module):
    """A GRU over bytes, the state passed and returned."""

    def __init__(self, vocab=256):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.cell, self.head = nn.Embedding(vocab, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, vocab)

    def forward(self, input_ids, state=None):
        hidden, state = self.cell(self.embed(input_ids), state)
        return self.head(hidden), state


class Steps(Tiny):
    """Carries its state through single tokens only."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, state if input_ids.shape[1] == 1 else None)


class Whole(Tiny):
    """Returns no state."""

    def forward(self, input_ids):
        return super().forward(input_ids)[0]


class Mixing(Tiny):
    """The logits of a row depend on the other rows of its batch."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits + 0.1 * logits.mean(dim=0, keepdim=True), state


class Odd(Tiny):
    """Declares a weight as a fast weight, which it is not."""

    def fast_weights(self, state):
        return [self.head.weight]


class Other(Tiny):
    pass
