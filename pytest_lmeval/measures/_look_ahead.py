"""Hold the next documents of a corpus, so that short ones are read side by side, as rows of one padded batch.

A group of documents is held at a time: as many tokens as several chunks have. Those that are read in one call are sorted by
length into batches of at most as many tokens as a chunk. Their losses are handed out in the order of the documents, so that
sums, audits and checkpoints see what they would see of one document after another. Where a group begins depends on the
documents alone: a reading that resumes inside of it (`LossAccumulator.ahead`) forms the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from pytest_lmeval.data._tokens import TokenReader
from pytest_lmeval.engine import Chunk, Engine
from pytest_lmeval.engine._losses import check_finite
from pytest_lmeval.engine._memory import most_logits
from pytest_lmeval.engine._tokens import Tokens
from pytest_lmeval.scoring._loss_accumulator import LossAccumulator

AHEAD = 16  # chunks whose tokens a group may have, and batches whose documents


class HeldDocument:
    """A document as a `TokenReader`, of which the tokens, or the first of them, are held.

    skip   begin with this token
    size   tokens that are held
    whole  these are all
    batch  the documents that are read in one call with it, longest first; empty if it is read alone
    chunk  its only one, once its batch is read
    """

    def __init__(self, reader: TokenReader) -> None:
        self._reader, self._rest = reader, iter(reader)
        self._parts: list[Tokens] = []
        self.skip, self.size, self.whole, self.batch = 0, 0, False, list[HeldDocument]()
        self.chunk: Chunk | None = None

    def hold(self, most: int) -> None:
        """Hold its tokens, up to the part with which they are more than so many. An error is raised when it is read."""
        try:
            while self.size <= most and not self.whole:
                if (part := next(self._rest, None)) is None:
                    self.whole = True
                else:
                    self._parts.append(part)
                    self.size += len(part)
        except Exception as error:  # noqa: BLE001 - the documents before it are read first
            self._rest = _raising(error)

    @property
    def is_empty(self) -> bool:
        return self.whole and self.size < 2

    @property
    def width(self) -> int:
        """Tokens that each row of its batch has, with the padding."""
        return self.batch[0].size - 1 if self.batch else 0

    @property
    def number(self) -> int:
        return self._reader.number

    @property
    def special(self) -> int:
        return self._reader.special

    @property
    def hexdigest(self) -> str:
        return self._reader.hexdigest

    @property
    def tokens(self) -> Tokens:
        return Tokens.joined(self._parts)

    def __iter__(self) -> Iterator[Tokens]:
        at = 0
        for part in chain(self._parts, self._rest):
            if at + len(part) > self.skip:
                yield part[max(0, self.skip - at) :]
            at += len(part)

    def read(self, engine: Engine) -> Chunk:
        """Its only chunk, which is computed with those of its batch. Raises NotFiniteError for a loss that is not finite."""
        if self.chunk is None:
            for document, chunk in zip(self.batch, engine.stream_rows([one.tokens for one in self.batch]), strict=True):
                document.chunk = chunk
        assert self.chunk is not None
        check_finite(self.chunk.nll, self.tokens.ids, 1, engine.lm)
        return self.chunk


def reads_side_by_side(engine: Engine, sums: LossAccumulator) -> bool:
    """Whether documents may be read as rows of a batch. Fast weights are measured in the state after each document."""
    lm, policy = engine.lm, engine.policy
    readable = (policy.carry or policy.windows is not None) and lm.codebooks is None
    return sums.by_document and policy.batch_size > 1 and not policy.invariant and readable and lm.fast_weights is None


def documents(engine: Engine, readers: Iterable[TokenReader], sums: LossAccumulator) -> Iterator[TokenReader | HeldDocument]:
    """The documents that are left to read."""
    done = len(sums.documents) + sums.skipped
    if not reads_side_by_side(engine, sums):
        yield from islice(readers, done, None)
        return
    first = sums.ahead
    for group in _groups(engine, islice(readers, first, None)):
        sums.ahead = first
        yield from group[max(0, done - first) :]
        first += len(group)


def _groups(engine: Engine, readers: Iterator[TokenReader]) -> Iterator[list[HeldDocument]]:
    """Consecutive documents of limited number and size; one that is larger than that is a group of its own, not held whole."""
    group: list[HeldDocument] = []
    failed: Exception | None = None
    while True:
        most, tokens = AHEAD * engine.policy.batch_size, AHEAD * engine.chunk_size
        try:
            reader = next(readers, None)
        except Exception as error:  # noqa: BLE001 - the documents before it are read first
            reader, failed = None, error
        if reader is None:
            break
        document = HeldDocument(reader)
        document.hold(left := tokens - sum(one.size for one in group))
        if group and (len(group) == most or not document.whole or document.size > left):
            yield _in_batches(engine, group)
            group = []
            document.hold(tokens)
        group.append(document)
        if not document.whole:  # the next one begins where it ends
            yield group
            group = []
    if group:
        yield _in_batches(engine, group)
    if failed is not None:
        raise failed


def _in_batches(engine: Engine, group: list[HeldDocument]) -> list[HeldDocument]:
    """The group, in which those that are read in one call know their batch."""
    lm, policy = engine.lm, engine.policy
    longest = min(engine.chunk_size, most_logits(lm))
    short = [
        one for one in group if one.whole and 2 <= one.size <= longest + 1 and _is_in_vocabulary(one.tokens, lm.vocab_size)
    ]
    if lm.served is not None:  # which is asked for each of them apart
        for document in short if len(short) > 1 else ():
            document.batch = short
        return group
    for numbers in batches([one.size - 1 for one in short], policy.batch_size, longest, policy.call):
        batch = [short[number] for number in numbers]
        for document in batch if len(batch) > 1 else ():
            document.batch = batch
    return group


def batches(lengths: Sequence[int], rows: int, tokens: int, call: int) -> list[list[int]]:
    """The numbers of texts of these lengths in batches of at most so many rows, and tokens with the padding; longest first. A
    text begins another batch if its padding would cost more than a `call` of its own, in tokens.

    >>> batches([10, 80, 12, 90, 11], rows=8, tokens=100, call=46)
    [[3], [1], [2, 4, 0]]
    """
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        width = lengths[found[-1][0]] if found else 0
        fits = found and len(found[-1]) < rows and (len(found[-1]) + 1) * width <= tokens
        if fits and width - lengths[number] <= call:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def _is_in_vocabulary(tokens: Tokens, size: int) -> bool:
    return bool(np.all((tokens.ids >= 0) & (tokens.ids < size)))


def _raising(error: Exception) -> Iterator[Tokens]:
    raise error
    yield
