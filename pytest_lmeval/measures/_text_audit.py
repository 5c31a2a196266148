"""Read the beginning of a text a second time while it is streamed, and refuse the text where the two readings differ."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from pytest_lmeval.data._tokens import TokenReader
from pytest_lmeval.engine import Chunk, Engine, Policy, Windows
from pytest_lmeval.engine._policy import CALL, default_chunk_size
from pytest_lmeval.engine._tokens import Tokens
from pytest_lmeval.errors import LmevalError, Refused
from pytest_lmeval.measures._audit import GROSS, SHARE, UNEXPLAINED, excess_of, law_broken
from pytest_lmeval.measures._look_ahead import HeldDocument, reads_side_by_side
from pytest_lmeval.models._failures import NoMemory, halving, unless_full
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import Audit
from pytest_lmeval.scoring._loss_accumulator import Beginning, LossAccumulator

if TYPE_CHECKING:
    from pytest_lmeval.laws._tolerance import Excess

WHOLE = 16  # chunks read in one call: attention to n tokens takes no more memory than the text, if n is a twentieth of it
KEPT = 1 << 16  # tokens of a text of unknown length that are kept to be read again
BETWEEN = 0.382  # of a chunk: pieces shorter than a multiple of it by so much end between the chunks
FURTHER, LAST = 2.0, 1.25  # times the last reading, from which another one is worth its cost, and the last of a sequence
ALONE = "Repair how it reads rows, or read each document alone: invariant=True."
COURSE = 64  # tokens read after the first wrong one, to see how the error goes on


def text_audit(engine: Engine, sums: LossAccumulator, expected: Callable[[], int | None], name: str) -> TextAudit:
    """The audit that a text needs as its policy reads it.

    expected  () -> the number of targets of the whole text; None if unknown: then each reading goes twice as far as the last
    name      of the text
    """
    windows = engine.policy.windows
    carried = engine.policy.carry and (windows is None or engine.chunk_size < windows.size)
    return (CarriedAudit if carried else WindowAudit)(engine, sums, expected, name)


class TextAudit(ABC):
    """Reads the beginning of a text again while it is streamed. What it needs and finds is in the `beginning` of the sums."""

    advice = ""

    def __init__(self, engine: Engine, sums: LossAccumulator, expected: Callable[[], int | None], name: str) -> None:
        self.engine, self.sums, self.expected, self.name = engine, sums, expected, name
        self.chunk, self.certificate = engine.chunk_size, engine.policy.certificate
        self.tried = 0 if self.certificate is None else self.certificate.longest
        self.books = 1 if engine.lm.codebooks is None else len(engine.lm.codebooks.scored)
        self.on, self.may_interrupt = self.certificate is not None, True
        self.rows = self.on and reads_side_by_side(engine, sums)  # whether documents that were read in a batch are read alone
        # tokens: of a reading that did not fit into memory; of the shortest one that says anything; of the longest one
        self.full, self.least, self.longest = 0, 1, math.inf

    def watched(self, reader: TokenReader | HeldDocument) -> Iterator[Tokens]:
        """The tokens of a sequence, of which the beginning is kept."""
        at, kept = reader.skip, self.sums.beginning
        for part in reader:
            if self._keeps and at <= kept.held < (room := self._room):
                kept.hold(part.ids[kept.held - at : room - at].copy())
            at += len(part)
            yield part

    def add(self, chunk: Chunk) -> None:
        """Note the losses of the next chunk, and read the beginning again when it is time. Raises Refused if it differs."""
        kept = self.sums.beginning
        if self._keeps:
            if chunk.window == 0 and chunk.start == kept.scored + 1:
                kept.score(chunk.nll[: max(0, kept.held - 1 - kept.scored)])
            if self.on and self.may_interrupt:  # another sequence may be read before this one is continued
                self._read_again(ended=False)

    def end(self, rows: int = 1, width: int = 0) -> None:
        """End a sequence, which was one of so many rows of a batch, as wide as this."""
        if self._keeps and rows > 1:
            self._read_alone(rows, width)
        if self.on and not self.sums.beginning.complete:
            self._read_again(ended=True)

    @property
    def result(self) -> Audit | None:
        """What was read again; None if nothing was."""
        found = self.sums.beginning
        if not found.tokens and not self.full:
            return None
        share = found.work / self._work(self.sums.tokens)
        return Audit(tokens=found.tokens, difference=found.difference, share=share, full=self.full)

    @property
    def _keeps(self) -> bool:
        return (self.on or self.rows) and not self.sums.beginning.complete

    def _read_alone(self, rows: int, width: int) -> None:
        """Read a document of a batch again, alone: the first that is no short one of its batch, whatever that costs, and later
        ones of twice the length."""
        kept = self.sums.beginning
        affordable = SHARE * self._work(self.expected() or self.sums.tokens) - kept.work - CALL
        due = FURTHER * kept.tokens <= kept.scored <= affordable if kept.tokens else 2 * kept.scored >= width
        if due and kept.scored > 1:
            self._compare(kept.scored, rows)

    def _work(self, targets: int) -> float:
        """Tokens and calls of a text with so many targets."""
        windows, tokens = self.engine.policy.windows, targets / self.books
        if windows is not None:
            tokens += max(0, math.ceil((tokens - windows.size) / (windows.size - windows.overlap))) * windows.overlap
        return tokens + CALL * math.ceil(tokens / self.chunk)

    def _compare(self, goal: int, rows: int = 1) -> None:
        """Read again as many targets, or half as many and so on if memory runs out; `rows` were read with them in a batch."""
        kept, lm, certificate = self.sums.beginning, self.engine.lm, self.engine.policy.certificate
        assert certificate is not None
        began = time.perf_counter()
        ids, found = np.concatenate(kept.ids)[: goal + 1], np.concatenate(kept.nll)[:goal]
        with _peak_apart(lm, kept):
            read, length = halving(lambda length: self._again(ids[: length + 1], length), goal, self.least if rows == 1 else 1)
        if length < goal or isinstance(read, NoMemory):
            self.full, self.longest = min(self.full or goal, goal), length
        if isinstance(read, NoMemory):
            self.on = self.rows = False  # and what is due later is longer
            return
        ids, found, (again, sizes) = ids[: length + 1], found[:length], read
        excess, broken = excess_of(found, again, lm, certificate.rounding), None
        if not excess.tolerance_ratio <= 1:
            law = (
                partial(self._rows_broken, ids, rows, excess) if rows > 1 else partial(self._broken, ids, found, sizes, excess)
            )
            tried = unless_full(law)
            broken = UNEXPLAINED if isinstance(tried, NoMemory) else tried
        if broken:
            pieces = ", ".join([*map(str, sizes[:4]), *["..."] * (len(sizes) > 4)])
            what = f"its first {length:,} tokens, in chunks of {self.chunk}, were read again in pieces of {pieces}"
            if rows > 1:
                number = len(self.sums.documents) + self.sums.skipped
                what = f"{length:,} tokens of document {number}, one of {rows} rows of a batch, were read again alone"
            raise Refused(
                f"{lm.spec} is {certificate.summary}, and {self.name} contradicts it: {what}, and the loss after token "
                f"{excess.position} differs by {excess.error:.3g} nats (allowed {excess.allowed:.2g}).\n{broken}\n"
                f"Its perplexity would be wrong, and may look good: nothing is reported. {self.advice if rows == 1 else ALONE}"
            )
        kept.again, kept.tokens = length, max(kept.tokens, length)
        kept.difference = max(kept.difference, excess.error)
        kept.work += length + CALL * len(sizes)
        kept.seconds += time.perf_counter() - began

    def _rows_broken(self, ids: np.ndarray, rows: int, excess: Excess) -> str | None:
        """That the law `rows` is broken on this text, with its counterexample; None if rounding explains the difference."""
        cuts = [max(1, (len(ids) - 1) // 2)]
        if (broken := law_broken(self.engine, "rows", ids[:-1], cuts, cuts[0], rows=rows, padding=3)) is not None:
            return broken
        return None if excess.tolerance_ratio <= GROSS else "  rows: alone it has other losses than beside its neighbours."

    @property
    @abstractmethod
    def _room(self) -> int:
        """Tokens of a sequence to keep."""

    @abstractmethod
    def _read_again(self, *, ended: bool) -> None:
        """Read again as far as is due, and drop what was kept if there will be no more."""

    @abstractmethod
    def _again(self, ids: np.ndarray, length: int) -> tuple[np.ndarray, list[int]]:
        """The losses of the first `length` targets, read in other pieces than before, and the lengths of these."""

    @abstractmethod
    def _broken(self, ids: np.ndarray, found: np.ndarray, sizes: list[int], excess: Excess) -> str | None:
        """The law that is broken on this text, with its counterexample; None if rounding explains the difference."""


class CarriedAudit(TextAudit):
    """Of a text whose state is carried: reads once across the first two boundaries between its chunks, and once as far as the
    share of the work pays for.

    It reads in one call, where that fits, else in pieces that end between the chunks. Where chunks are longer than what the
    probe read, one call may be as wrong as they are, so the end is read in pieces of a length that was tried.
    """

    advice = "Repair its state, or read windows that carry none: window=512."

    def __init__(self, engine: Engine, sums: LossAccumulator, expected: Callable[[], int | None], name: str) -> None:
        super().__init__(engine, sums, expected, name)
        lm, policy = engine.lm, engine.policy
        window = math.inf if policy.windows is None else policy.windows.size
        self.may_interrupt = self.certificate is not None and "fork" in self.certificate.with_status("kept")
        tried = 0 if policy.single else self.tried // policy.multiple * policy.multiple
        self.tried = tried if tried < self.chunk else 0
        self.first = 2 * self.chunk + self.chunk // 8 + 1
        self.whole = int(min(max(WHOLE * self.chunk, default_chunk_size(lm)), policy.longest or math.inf, lm.limit or math.inf))
        self.piece = self._between(self.whole)
        self.longest = min(window, math.inf if self.piece not in (0, self.chunk) else self.whole)
        self.least = self.chunk + 1

    def _between(self, most: int) -> int:
        """The length of pieces of at most so many tokens that end elsewhere than the chunks; 0 if there is none."""
        multiple = self.engine.policy.multiple
        return 0 if self.engine.policy.single else max(0, most - round(BETWEEN * self.chunk)) // multiple * multiple

    @property
    def _room(self) -> int:
        """Tokens of a sequence to keep."""
        return 1 + int(min(self.longest, max(KEPT, self.first, self._affordable)))

    @property
    def _affordable(self) -> int:
        """The longest beginning that may be read again now."""
        left = SHARE * self._work(self.expected() or self.sums.tokens) - self.sums.beginning.work - CALL
        if self.tried:
            left -= CALL * math.ceil(self.chunk / self.tried)
        if left > self.whole and self.piece:
            left = self.whole + (left - self.whole) * self.piece / (self.piece + CALL)
        return max(0, int(left))

    def _goal(self, *, ended: bool) -> int:
        """How many tokens to read again next; 0: no more."""
        kept, affordable = self.sums.beginning, self._affordable
        if not kept.tokens or (kept.tokens <= 2 * self.chunk and kept.scored >= self.first):  # whatever it costs
            early = not ended and (affordable >= 4 * self.first or not self.expected())
            goal = self.first if early else max(self.first, affordable)
        else:
            further = int(kept.tokens * (LAST if ended else FURTHER))  # or all of another document
            goal = affordable if affordable >= (min(kept.scored, further) if ended else further) else 0
        return int(min(goal, self.longest))

    def _read_again(self, *, ended: bool) -> None:
        """Read again as far as is due, and drop what was kept if there will be no more."""
        kept, goal = self.sums.beginning, self._goal(ended=ended)
        length = min(goal, kept.scored)
        if (length == goal or ended or kept.scored >= self._room - 1) and self._worth(length, LAST if ended else FURTHER):
            self._compare(length)
        furthest = min(self._room - 1, self._affordable if self.expected() else KEPT)
        if ended or not self.on or (kept.again and not self._worth(furthest)):
            kept.drop()

    def _worth(self, length: int, further: float = FURTHER) -> bool:
        """Whether another reading, of so many tokens, goes further enough than the last one."""
        again = self.sums.beginning.again
        return length > max(self.chunk, again) and (length >= further * again or length == self.longest)

    def _again(self, ids: np.ndarray, length: int) -> tuple[np.ndarray, list[int]]:
        """The losses in the longest pieces that the model reads, and their lengths."""
        most = min(self.whole, length)
        for smaller in (most // 2, most // 4, most // 8):
            if self._between(smaller) in (0, self.chunk):
                break
            sizes = self._sizes(length, most)
            try:
                found = unless_full(partial(_losses, self.engine.lm, ids, sizes))
                if not isinstance(found, NoMemory):
                    return found, sizes
            except LmevalError:
                raise
            except Exception:  # noqa: BLE001 - the model reads no calls of this length
                pass
            most = smaller
        sizes = self._sizes(length, most)
        return _losses(self.engine.lm, ids, sizes), sizes

    def _sizes(self, length: int, most: int) -> list[int]:
        """The lengths of pieces of at most so many tokens."""
        end = min(self.chunk, length // 4) if self.tried else 0
        head = (length - end) // self.engine.policy.multiple * self.engine.policy.multiple if end else length
        parts = [(head, head if head <= most else self._between(most)), (length - head, self.tried)]
        return [min(size, total - at) for total, size in parts for at in range(0, total, max(size, 1))]

    def _broken(self, ids: np.ndarray, found: np.ndarray, sizes: list[int], excess: Excess) -> str | None:
        """The law that is broken on this text, with its counterexample; None if rounding explains the difference."""
        lm, chunk = self.engine.lm, self.chunk
        wrong = next((at for at, ratio in enumerate(excess.profile.tolist()) if ratio > 1), excess.position)
        length = min(len(found), wrong + 1 + COURSE)
        for cuts in (range(chunk, length, chunk), [end for end in accumulate(sizes) if end < length]):
            last = max((cut for cut in cuts if cut <= wrong), default=chunk)
            if cuts and (broken := law_broken(self.engine, "splits", ids[:length], cuts, last)):
                return broken
        chunks = [min(chunk, length - at) for at in range(0, length, chunk)]
        same = excess_of(found[:length], _losses(lm, ids, chunks), lm, None)
        where = f"read in the same chunks once more, it was off by {same.error:.3g} nats at token {same.position}"
        return None if same.tolerance_ratio <= 1 else f"  repeat: {where}. It is not deterministic, or keeps something."


class WindowAudit(TextAudit):
    """Of a text in windows of one call each: where that is longer than what the probe read, reads the beginning of the first
    one alone, once as long as was tried, and once nearly to its end. So a model that sees its future, or whose losses depend
    on the length of the call, is found at the lengths in use."""

    def __init__(self, engine: Engine, sums: LossAccumulator, expected: Callable[[], int | None], name: str) -> None:
        super().__init__(engine, sums, expected, name)
        self.on, self.least = 0 < self.tried < self.chunk, self.tried
        self.advice = f"Repair it, or read calls of a length that was tried: window={self.tried}."

    @property
    def _room(self) -> int:
        return self.chunk + 1

    def _read_again(self, *, ended: bool) -> None:
        kept = self.sums.beginning
        if kept.scored < self.chunk and not ended:
            return
        lengths = [self.tried, kept.scored - kept.scored // 8]
        work = SHARE * self._work(self.expected() or self.sums.tokens) - sum(lengths) - CALL * len(lengths)
        if kept.scored > self.tried and (not kept.tokens or kept.work <= work):
            for length in lengths:
                if not self.full:
                    self._compare(max(length, self.tried))
        kept.drop()

    def _again(self, ids: np.ndarray, length: int) -> tuple[np.ndarray, list[int]]:
        alone = Engine(self.engine.lm, Policy(windows=Windows(length), chunk_size=length)).stream(ids[: length + 1])
        return np.concatenate([chunk.nll for chunk in alone]), [length]

    def _broken(self, ids: np.ndarray, found: np.ndarray, sizes: list[int], excess: Excess) -> str | None:
        window = np.concatenate(self.sums.beginning.ids)[: self.chunk]
        return law_broken(self.engine, "prefix", window, sizes, sizes[0])


def _losses(lm: Model, ids: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The losses of the beginning of a text that is read in pieces of these lengths."""
    state, at, parts = None, 0, list[np.ndarray]()
    for size, pieces in groupby(sizes):
        end = at + size * len(list(pieces))
        last = end + (lm.codebooks is None)  # a target
        for chunk in Engine(lm, Policy(chunk_size=size)).stream(ids[at:last], state=state, position=at):
            state = chunk.state
            parts.append(chunk.nll)
        at = end
    return np.concatenate(parts)


@contextmanager
def _peak_apart(lm: Model, kept: Beginning) -> Iterator[None]:
    """Leave what is allocated in the block out of the peak of the device's memory."""
    on_cuda = lm.device.type == "cuda"
    if on_cuda:
        kept.peak_bytes = max(kept.peak_bytes, torch.cuda.max_memory_allocated(lm.device))
    yield
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(lm.device)
