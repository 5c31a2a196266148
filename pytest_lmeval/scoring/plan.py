"""How a corpus is read: carried or in windows, as one stream or by document, from its beginning or from a saved point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pytest_lmeval.data.corpus import Corpus, Document
from pytest_lmeval.data.tokens import TokenReader
from pytest_lmeval.lm import Model, State
from pytest_lmeval.scoring.reading import Reading, rows_of
from pytest_lmeval.stream import Chunk, StreamError, default_chunk_size, stream, stream_in_windows

WINDOW = 1024  # tokens of a window where the model names no limit of its own


@dataclass(frozen=True)
class Plan:
    """How a text is read: state carried in chunks (`window` None), or in windows that forget one another."""

    chunk_size: int
    window: int | None = None
    overlap: int = 0
    why: str = "the state is carried"

    def __str__(self) -> str:
        if self.window is None:
            return f"carried in chunks of {self.chunk_size}"
        return f"windows of {self.window}, {self.overlap} of them read again, in chunks of {self.chunk_size}"


def plan_for(
    lm: Model, *, chunk_size: int | None = None, window: int | Literal["unlimited"] | None = None, overlap: int | None = None
) -> Plan:
    """How to read with `lm`: carried where it has a state and no limit to its context, else in windows.

    window   tokens of a window; by default the model's context if it is limited, or 1024 if it has no state;
             "unlimited" carries the state past the context that the model was made for
    overlap  tokens of a window that are only read, not scored; half of it by default
    """
    chunk = default_chunk_size(lm.vocab_size) if chunk_size is None else chunk_size
    if chunk < 1:
        raise StreamError(f"chunk_size is {chunk}; a chunk has at least one token.")
    if window == "unlimited" and not lm.stateful:
        raise StreamError(f"{lm.spec} has no state to carry: it can only be read in windows.")
    if window is None and not lm.stateful:
        window, why = lm.context_length or WINDOW, "the model has no state to carry"
    elif window is None and lm.context_length is not None:
        window, why = lm.context_length, f"the model's context is {lm.context_length} tokens"
    else:
        why = "windows were asked for"
    if window is None or window == "unlimited":
        return Plan(chunk)
    overlap = window // 2 if overlap is None else overlap
    return Plan(min(chunk, window) if lm.stateful else window, window, overlap, why)


@dataclass(frozen=True)
class Point:
    """A place in a corpus between two chunks: enough to go on from there with the same final numbers.

    document  documents before the current one
    opened    whether a chunk of the current one was read
    scored    the last target of the current sequence that was scored: also the last token but one that was read
    window    where the current window begins
    nll       losses of the chunk that led here
    """

    reading: Reading
    document: int = 0
    opened: bool = False
    scored: int = 0
    window: int = 0
    state: State = None
    seconds: float = 0.0
    nll: np.ndarray | None = None


@dataclass(frozen=True)
class Reader:
    """Reads a corpus by a plan; `tokens` of each sequence, `limit` documents."""

    lm: Model
    corpus: Corpus
    plan: Plan
    tokens: int | None
    limit: int | None
    by_document: bool

    def read(self, point: Point) -> Iterator[Point]:
        """The points after each chunk, from `point` on."""
        for index, documents in self._sequences():
            if index < point.document:
                continue
            if not (index == point.document and point.opened):
                point.reading.start_document()
                point = Point(point.reading, document=index)
            skip = point.scored if self.plan.window is None else point.window
            ids = TokenReader(self.lm, documents, skip=skip, scored=point.scored, limit=self.tokens)
            try:
                for chunk in self._chunks(ids, point):
                    rows = rows_of(chunk.nll, chunk.rank, ids.take_bytes(len(chunk.nll)), chunk.valid)
                    point.reading.add(chunk.start, rows, seconds=chunk.seconds, state_bytes=chunk.state_bytes)
                    after = {"scored": chunk.end - 1, "window": chunk.window, "state": chunk.state, "nll": chunk.losses}
                    point = replace(point, opened=True, **after)
                    yield point
            except StreamError as error:
                where = f"{self.corpus}" + (f", document {index}" if self.by_document else "")
                raise StreamError(f"{where}: {error}") from error

    def _chunks(self, ids: Iterable[Any], point: Point) -> Iterator[Chunk]:
        if self.plan.window is None:
            return stream(self.lm, ids, chunk_size=self.plan.chunk_size, state=point.state, position=point.scored)
        return stream_in_windows(
            self.lm,
            ids,
            window=self.plan.window,
            overlap=self.plan.overlap,
            chunk_size=self.plan.chunk_size,
            state=point.state,
            position=point.window,
            read_to=point.scored if point.opened else None,
        )

    def _sequences(self) -> Iterator[tuple[int, Iterable[Document]]]:
        documents = self.corpus.documents()
        if self.limit is not None:
            documents = (document for document, _ in zip(documents, range(self.limit), strict=False))
        if not self.by_document:
            yield 0, documents
            return
        for index, document in enumerate(documents):
            yield index, [document]
