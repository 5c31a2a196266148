"""A model source: a function from the text behind the colon to a torch module, or to an object with `step`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pytest_lmeval import SpecError


class Uniform(nn.Module):
    """Finds every token equally likely, whatever came before."""

    constant_state = True

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, input_ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [b, t, v] of the token after each of `input_ids` [b, t], and a state [b] that holds nothing."""
        return self.logits.repeat(*input_ids.shape, 1), self.logits.new_zeros(len(input_ids))


def uniform(rest: str = "256") -> Uniform:
    """`uniform`, or `uniform:50`: the size of the vocabulary."""
    if not rest.isdigit() or int(rest) < 1:
        raise SpecError(f"uniform:{rest}: {rest!r} is no size of a vocabulary. Write, for example, uniform:50.")
    return Uniform(int(rest))
