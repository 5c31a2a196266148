"""Tokenize a text that arrives in parts as if it came whole, in the memory of a few windows.

A part cannot be tokenized alone: many tokenizers put a space before whatever begins a text, and a token may span two parts. So
windows that overlap are tokenized, whatever the parts, and each is joined to the next inside their overlap, between tokens at
which both agree for a run on either side.

That is exact for tokenizers by merges (BPE), with or without a division into words. Between two joins the text evolves in its
window as it would alone, since no merge crosses the ends of its tokens. What stands beside a join, on its left, is one token in
both windows, so it goes through the same merges in both. So whatever is side by side at a join while the whole text is merged,
was so in the right window too, and was not merged there. Agreement of a run of tokens, rather than one, covers rules that
divide a text into words by what is near. Tokenizers by likelihood (Unigram) may differ where two ways are equally likely.

Where windows agree nowhere in their overlap (a number of ten thousand digits), the left window is tokenized again together
with the right one, which is exact too, and costs memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pytest_lmeval.engine._tokens import Tokens

WINDOW = 1 << 16  # characters that are tokenized at once, at least
OVERLAP = 1 << 12  # of these, characters of the window before
RUN = 16  # tokens at which two windows agree, on either side of where they are joined


def tokenized(
    tokenizer: Any, parts: Iterable[str], *, window: int = WINDOW, overlap: int = OVERLAP, run: int = RUN
) -> Iterator[Tokens]:
    """Yield the tokens of the joined parts, each with its number of bytes."""
    source = _Source(parts, window)
    if not (text := source.take(window)):
        return
    ids, ends = _encoded(tokenizer, text)
    given = at = 0  # tokens of the window that were yielded, and the byte where they end
    while more := source.take(window):
        tail = text[-overlap:]
        begin = len(text.encode()) - len(tail.encode())
        next_ids, next_ends = _encoded(tokenizer, tail + more)
        if (found := _join(ids, ends, next_ids, next_ends + begin, run)) is not None:
            last, first = found
            yield _tokens(ids[given:last], ends[given:last], at)
            text, ids, ends, given, at = tail + more, next_ids, next_ends, first, int(ends[last - 1]) - begin
            continue
        text += more + source.take(len(text))  # twice as long, so that the work is no more than twice that of the last time
        longer, longer_ends = _encoded(tokenizer, text)
        same = int(np.argmin(np.append(ids[: len(longer)] == longer[: len(ids)], False)))
        if same < given:  # what was yielded is tokenized otherwise now: go on at the same byte
            given = int(np.searchsorted(longer_ends, at, side="right"))
        elif (last := same - run) > given:
            yield _tokens(longer[given:last], longer_ends[given:last], at)
            given, at = last, int(longer_ends[last - 1])
        ids, ends = longer, longer_ends
    if given < len(ids):
        yield _tokens(ids[given:], ends[given:], at)


def _join(ids: np.ndarray, ends: np.ndarray, next_ids: np.ndarray, next_ends: np.ndarray, run: int) -> tuple[int, int] | None:
    """The number of tokens of a window up to where it is joined to the next one, and that of the next one; None if nowhere.

    Of all positions at which both agree for `run` tokens on either side, it is the one nearest to the middle of the overlap.
    """
    (one, own), (other, theirs) = (_boundaries(bytes_) for bytes_ in (ends, next_ends))
    positions, left, right = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    for index in np.argsort(np.abs(positions - positions.mean())) if len(positions) else ():
        last, first = int(own[left[index]]), int(theirs[right[index]])
        if min(last, first, len(ids) - last, len(next_ids) - first) < run:
            continue
        here, there = slice(last - run, last + run), slice(first - run, first + run)
        if np.array_equal(ids[here], next_ids[there]) and np.array_equal(ends[here], next_ends[there]):
            return last, first
    return None


def _boundaries(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes at which tokens end, and how many tokens end there or before: several tokens may share one character."""
    last = np.flatnonzero(np.diff(ends, append=ends[-1:] + 1))
    return ends[last], last + 1


def _encoded(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    ids, ends = (np.asarray(part, dtype=np.int64) for part in tokenizer.encode(text))
    return ids, ends


def _tokens(ids: np.ndarray, ends: np.ndarray, begin: int) -> Tokens:
    return Tokens(ids, np.diff(np.maximum(ends, begin), prepend=begin))


class _Source:
    """A text that arrives in parts."""

    def __init__(self, parts: Iterable[str], most: int) -> None:
        self.parts = (part[at : at + most] for part in parts for at in range(0, len(part), most))
        self.rest = ""

    def take(self, characters: int) -> str:
        """The next characters; fewer at the end of the text."""
        held, size = [self.rest], len(self.rest)
        while size < characters and (part := next(self.parts, None)) is not None:
            held.append(part)
            size += len(part)
        text = "".join(held)
        self.rest = text[characters:]
        return text[:characters]
