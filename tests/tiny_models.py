"""Small language models: correct ones, one of each form, and some with a known fault."""

from __future__ import annotations

import io
from contextlib import contextmanager

import torch
from torch import nn

from pytest_lmeval.zoo._transformer import Transformer

VOCAB = 32


class Functional(nn.Module):
    """A GRU, the state passed and returned."""

    def __init__(self, vocab: int = VOCAB, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocab, width)
            self.cell = nn.GRU(width, width, batch_first=True)
            self.head = nn.Linear(width, vocab)

    def forward(self, input_ids, state=None):
        hidden, state = self.cell(self.embed(input_ids), state)
        return self.head(hidden), state


class Stateless(Functional):
    """The same logits, and no state to continue from."""

    def forward(self, input_ids):
        return super().forward(input_ids)[0]


class Growing(Functional):
    """Keeps what is hidden after each token, as a cache does."""

    def forward(self, input_ids, state=None):
        hidden, _ = self.cell(self.embed(input_ids), None if state is None else state[None, :, -1].contiguous())
        return self.head(hidden), hidden if state is None else torch.cat([state, hidden], dim=1)


class GetSetState(Functional):
    """The module holds its state, and goes on writing to what get_state returned."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.held = None

    def forward(self, input_ids):
        logits, state = super().forward(input_ids, self.held)
        if self.held is None:
            self.held = state
        else:
            self.held.copy_(state)
        return logits

    def get_state(self):
        return self.held

    def set_state(self, state):
        self.held = state

    def reset_state(self):
        self.held = None


class Streaming(Functional):
    """A streaming context and a step; the state cannot be taken out."""

    @contextmanager
    def streaming(self, batch_size):
        self.held = None
        yield
        self.held = None

    def step(self, input_ids):
        logits, self.held = super().forward(input_ids, self.held)
        return logits


class PortableStreaming(Streaming):
    """A streaming context whose state can be taken out and put back."""

    def get_streaming_state(self):
        return {"hidden": self.held}

    def set_streaming_state(self, state):
        self.held = state["hidden"]


class Stepper:
    """An object with `step`, and no module."""

    def __init__(self) -> None:
        self.model = Functional()

    def step(self, input_ids, state=None):
        with torch.no_grad():
            return self.model(input_ids, state)


CARRYING = [Functional, GetSetState, Streaming, PortableStreaming, Stepper]


class Changed(Functional):
    """Returns `change(logits, state)`."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, input_ids, state=None):
        return self.change(*super().forward(input_ids, state))


class Fragile(Functional):
    """Drops its state if `wrong(seen, t)`, for t tokens after `seen`."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward(self, input_ids, state=None):
        hidden, seen = state or (None, 0)
        logits, hidden = super().forward(input_ids, None if self.wrong(seen, input_ids.shape[1]) else hidden)
        return logits, (hidden, seen + input_ids.shape[1])


class Dropped(Functional):
    """Wrong: forgets its state whenever a chunk of more than one token continues a sequence."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, state if input_ids.shape[1] == 1 else None)


class Forgetful(Functional):
    """Wrong: returns a state, and always starts over."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, None)


class Seeing(Functional):
    """Wrong: each position sees the mean of the whole chunk."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits + 1e-3 * logits.mean(dim=1, keepdim=True), state


class Learning(Functional):
    """Wrong: changes a weight while it reads, that of an id which it never looks up."""

    def forward(self, input_ids, state=None):
        with torch.no_grad():
            self.embed.weight[VOCAB - 1] += 1e-3
        return super().forward(input_ids.clamp(max=VOCAB - 2), state)


class Broken(Functional):
    """Wrong: gives NaN for the token after id 7, as an overflow would."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits.masked_fill((input_ids == 7)[..., None], float("nan")), state


class LastOnly(Functional):
    """Wrong: returns the logits of the last position only."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits[:, -1:], state


class Promising(Functional):
    """Wrong: returns a state for the first token, and none later."""

    def forward(self, input_ids, state=None):
        logits, new_state = super().forward(input_ids, state)
        return logits, new_state if state is None else None


class Neighbourly(Functional):
    """Wrong: a row's logits move with the mean of its batch."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits + 0.01 * (logits.mean(dim=0, keepdim=True) - logits), state


class Shared(Functional):
    """Wrong: the state is a number, under which the module keeps the real state; a copy has the same number."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.kept = {}

    def forward(self, input_ids, state=None):
        number = len(self.kept) if state is None else state[0]
        logits, self.kept[number] = super().forward(input_ids, self.kept.get(number))
        return logits, [number]


class Drowned(Functional):
    """Wrong: drops a quarter of its state in chunks of more than one token; in bfloat16 noise hides it."""

    def forward(self, input_ids, state=None):
        if state is not None and input_ids.shape[1] > 1:
            state = torch.cat([torch.zeros_like(state[..., :4]), state[..., 4:]], dim=-1)
        logits, state = super().forward(input_ids, state)
        if logits.dtype == torch.bfloat16:
            logits = logits + 0.05 * torch.sin(1000 * logits.float()).to(logits.dtype)
        return logits, state


class Failing(io.BytesIO):
    """A file whose write number `fails`, counted from 1, raises an error."""

    def __init__(self, fails, error):
        super().__init__()
        self.fails, self.error, self.writes = fails, error, 0

    def write(self, content):
        self.writes += 1
        if self.writes == self.fails:
            raise self.error("in the middle of it")
        return super().write(content)


def small_transformer(**options):
    """A transformer that reads several sequences in one row."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = Transformer(**{"width": 32, "layers": 2, "heads": 2, "hidden": 32, **options}).eval()
        nn.init.normal_(found.embed.weight, std=0.5)
    return found
