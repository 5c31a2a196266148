"""Let a model run out of memory at chosen calls, or whenever it reads more than so many tokens at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tiny_models import VOCAB
from torch import nn

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1.2 GiB free."),
    "python": lambda: MemoryError(),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "4294967296 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


@dataclass(eq=False)
class Memory:
    """What a module that runs out of memory was asked for. A copy of the module shares it.

    shapes  of the tokens of each call, from which it is counted, beginning with 1
    raised  the calls that ran out
    """

    at: Collection[int] = ()
    above: int | None = None
    error: str = "cuda"
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    raised: list[int] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return len(self.shapes)

    def __deepcopy__(self, memo: object) -> Memory:
        return self

    def spent(self) -> bool:
        """Whether the call that is being read is one that runs out."""
        rows, tokens = self.shapes[-1][0], self.shapes[-1][-1]
        return self.calls in self.at or (self.above is not None and rows * tokens > self.above)

    def run_out(self) -> None:
        if self.spent() and self.calls not in self.raised:
            self.raised.append(self.calls)
            raise ERRORS[self.error]()


@dataclass(eq=False)
class Hook:
    """Calls `does` on a memory: no function, so that it is no part of the module's fingerprint."""

    memory: Memory
    does: str

    def __deepcopy__(self, memo: object) -> Hook:
        return self

    def __call__(self, module: nn.Module, *given: object) -> None:
        if self.does == "count":
            args, kwargs = given
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.memory.shapes.append(tuple(ids.shape))
        elif self.does == "backward":
            output = given[1][0] if isinstance(given[1], tuple) else given[1]
            if output.requires_grad:
                output.register_hook(lambda gradient: self.memory.run_out())
        else:
            self.memory.run_out()


@contextmanager
def running_out(
    module: nn.Module,
    *,
    at: int | Collection[int] = (),
    above: int | None = None,
    error: str = "cuda",
    in_place: bool = False,
    backward: bool = False,
) -> Iterator[Memory]:
    """Let a module, and the copies of it that are made meanwhile, run out of memory.

    at        the calls that run out, counted from 1: one, or several
    above     rows x tokens: each call of more runs out
    error     "cuda", "python" or "cpu": whose error it is
    in_place  it raises in the middle of its layers, after the first of them have changed their part of the state
    backward  it raises when gradients have come as far as that layer
    """
    memory = Memory({at} if isinstance(at, int) else at, above, error)
    within = _middle(module)
    handles = [module.register_forward_pre_hook(Hook(memory, "count"), with_kwargs=True)]
    if backward:
        handles.append(within.register_forward_hook(Hook(memory, "backward")))
    else:
        handles.append((within if in_place else module).register_forward_pre_hook(Hook(memory, "raise")))
    try:
        yield memory
    finally:
        for handle in handles:
            handle.remove()


def _middle(module: nn.Module) -> nn.Module:
    """The layer in the middle of the first list of layers; of a module without one, its first part."""
    layers = next((part for part in module.modules() if isinstance(part, nn.ModuleList)), None)
    return next(module.children()) if layers is None else layers[len(layers) // 2]


class Layered(nn.Module):
    """A stack of GRUs. Each layer writes its part of the state in place as soon as it has read."""

    def __init__(self, vocab: int = VOCAB, width: int = 8, layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab)
            self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(layers))
            self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids, state=None):
        hidden, given = self.embed(input_ids), state or [None] * len(self.layers)
        new = []
        for layer, before in zip(self.layers, given, strict=True):
            read, after = layer(hidden, None if before is None else before.clone())
            new.append(after if before is None else before.copy_(after))
            hidden = hidden + self.dropout(read)
        return self.head(hidden), new
