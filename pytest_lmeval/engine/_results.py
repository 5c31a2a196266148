"""Hold what was read, by the number of the request, so that nothing that is there is read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from pytest_lmeval.models._model import State, state_bytes

T = TypeVar("T")


@dataclass
class Scored:
    """The result of one request.

    loglikelihood  [n - context_len] float64, nats, of each requested token
    greedy         whether each of them is the model's first choice
    read           tokens read for this request and for none before it
    state_bytes    the largest state until it was read
    """

    loglikelihood: np.ndarray
    greedy: bool = True
    read: int = 0
    state_bytes: int = 0


@dataclass
class Counts:
    """Tokens read, padding read with them, the steps that read them, and the largest state in bytes."""

    tokens: int = 0
    padding: int = 0
    calls: int = 0
    peak_state_bytes: int = 0

    def add(self, tokens: int, padding: int, calls: int = 1) -> None:
        """Count a step, or several."""
        self.tokens, self.padding, self.calls = self.tokens + tokens, self.padding + padding, self.calls + calls

    def hold(self, state: State | int) -> None:
        """Note a state, or the bytes of one."""
        self.peak_state_bytes = max(self.peak_state_bytes, state if isinstance(state, int) else state_bytes(state))

    def since(self, before: Counts) -> Counts:
        """What was added after `before`."""
        added = (self.tokens - before.tokens, self.padding - before.padding, self.calls - before.calls)
        return Counts(*added, self.peak_state_bytes)

    def include(self, other: Counts) -> None:
        """Count what was counted elsewhere, too."""
        self.add(other.tokens, other.padding, other.calls)
        self.hold(other.peak_state_bytes)


class Results(Generic[T]):
    """The results of requests by their number. Those of a batch are added as the batch ends; a batch whose results are all
    there is not read.

    found  results of an earlier reading
    keep   called with each batch of new ones
    """

    def __init__(self, found: Mapping[int, T] | None = None, keep: Callable[[dict[int, T]], None] | None = None) -> None:
        self.found, self._keep = dict(found or {}), keep

    def of(self, numbers: Sequence[int]) -> list[T] | None:
        """All results of these requests; None if one is missing."""
        return [self.found[number] for number in numbers] if all(number in self.found for number in numbers) else None

    def add(self, new: dict[int, T]) -> None:
        self.found |= new
        if self._keep is not None:
            self._keep(new)

    def alone(self, number: int) -> Results[T]:
        """The same of one request, whose number there is 0."""
        known = {0: self.found[number]} if number in self.found else {}
        return Results(known, lambda new: self.add({number: new[0]}))


class Deferred:
    """A state that is computed when it is first asked for.

    before  the state that it is computed from, if that is deferred, too
    """

    def __init__(self, compute: Callable[[], State], before: Deferred | None = None) -> None:
        self._compute: Callable[[], State] | None = compute
        self._before = before

    def get(self) -> State:
        if self._compute is not None:
            self._state, self._compute, self._before = self._compute(), None, None  # frees what it was computed from
        return self._state

    @property
    def known(self) -> bool:
        return self._compute is None

    def then(self, compute: Callable[[State], State]) -> Deferred:
        """What is computed from this state: at once, if it is known."""
        after = Deferred(lambda: compute(self.get()), self)
        after.settle()
        return after

    def settle(self) -> None:
        """Compute the state if that takes no reading, so that what it is a part of is freed."""
        if self._before is not None and self._before.known:
            self.get()


NOTHING_READ = Deferred(lambda: None)
