"""Cut sequences into batches whose calls and tokens cost least together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, log
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

TRIED = 64  # numbers of rows of a batch that are tried
ABOUT = 1.02  # times the least cost, which is about the least


class Limits(NamedTuple):
    """The most that a call may read.

    rows    of a batch
    tokens  of all rows together, with padding; a single row may have more
    """

    rows: int
    tokens: int


class Priced(Protocol):
    """What reading takes: tokens, with padding, and calls."""

    @property
    def tokens(self) -> int: ...

    @property
    def calls(self) -> int: ...


P = TypeVar("P", bound=Priced)


def cheapest(plans: Sequence[P], call: float) -> P:
    """The plan of the fewest calls among those that cost about the least, since what a call costs is known roughly."""
    least = min(plan.tokens + call * plan.calls for plan in plans)
    return min((plan for plan in plans if plan.tokens + call * plan.calls <= ABOUT * least), key=lambda plan: plan.calls)


def cheapest_parts(count: int, cost: Callable[[int], np.ndarray]) -> list[range]:
    """Cut 0, 1, ..., count - 1 into ranges that cost least together.

    cost  (begin) -> the costs of the ranges from there that hold 1, 2, ... numbers, as many as may be; inf forbids one

    >>> cheapest_parts(3, lambda begin: np.array([5.0, 6.0, 99.0])[: 3 - begin])
    [range(0, 1), range(1, 3)]
    """
    best, begins = np.full(count + 1, inf), np.zeros(count + 1, dtype=np.int64)
    best[0] = 0
    for begin in range(count):
        costs = best[begin] + cost(begin)
        ends = slice(begin + 1, begin + 1 + len(costs))
        cheaper = costs < best[ends]
        best[ends] = np.where(cheaper, costs, best[ends])
        begins[ends] = np.where(cheaper, begin, begins[ends])
    return _parts(begins.tolist(), count)


def padded_parts(lengths: Sequence[int], firsts: Sequence[int], limits: Limits, call: float, logits: int) -> list[range]:
    """Cut sequences, the longest first, into batches that are padded to the longest of each.

    firsts  the index in each sequence of the first token whose logits are wanted
    call    what a call costs, in tokens
    logits  tokens of a batch at most from the first whose logits are wanted, with those of the padding
    """
    count, rows = len(lengths), min(limits.rows, len(lengths))
    best, begins, stride = [0.0] + [inf] * count, [0] * (count + 1), -(-rows // TRIED)
    most = call * (1 + log(max(rows, 1)))  # a batch with more padding costs less in two (it is at most that under call / row)
    for begin in range(count):
        width, padding, first = lengths[begin], 0, lengths[begin]
        for end in range(begin + 1, min(begin + rows, count) + 1):
            size, padding, first = end - begin, padding + width - lengths[end - 1], min(first, firsts[end - 1])
            full = size * width > limits.tokens or size * (width - first) > logits or padding > most
            if full and size > 1:
                break
            cost = best[begin] + call + size * width
            if cost < best[end] and (size % stride == 0 or end == count or size == 1):
                best[end], begins[end] = cost, begin
    return _parts(begins, count)


def _parts(begins: Sequence[int], end: int) -> list[range]:
    """The ranges up to `end`, of which `begins` holds where the one with each end begins."""
    parts = list[range]()
    while end:
        parts.append(range(int(begins[end]), end))
        end = parts[-1].start
    return parts[::-1]
