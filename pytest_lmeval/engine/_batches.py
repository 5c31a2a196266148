"""Cut sequences into batches whose calls and tokens cost least together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

import numpy as np


class Limits(NamedTuple):
    """The most that a call may read.

    rows    of a batch
    tokens  of all rows together, with padding; a single row may have more
    """

    rows: int
    tokens: int


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
    parts, end = list[range](), count
    while end:
        parts.append(range(int(begins[end]), end))
        end = int(begins[end])
    return parts[::-1]


def padded_parts(lengths: Sequence[int], firsts: Sequence[int], limits: Limits, call: float, logits: int) -> list[range]:
    """Cut sequences, the longest first, into batches that are padded to the longest of each.

    firsts  the index in each sequence of the first token whose logits are wanted
    call    what a call costs, in tokens
    logits  tokens of a batch at most from the first whose logits are wanted, with those of the padding
    """
    first = np.asarray(firsts)

    def cost(begin: int) -> np.ndarray:
        width, rows = lengths[begin], np.arange(1, min(limits.rows, len(lengths) - begin) + 1)
        scored = rows * (width - np.minimum.accumulate(first[begin : begin + len(rows)]))
        fits = (rows == 1) | ((rows * width <= limits.tokens) & (scored <= logits))
        return np.where(fits, call + rows * width, inf)

    return cheapest_parts(len(lengths), cost)
