"""How a corpus is read: carried or in windows, as one stream or by document, from its beginning or from a saved point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, Literal

import numpy as np

from pytest_lmeval._stream import Chunk, default_chunk_size, stream, stream_in_windows
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.data._tokens import TokenReader
from pytest_lmeval.errors import StreamError
from pytest_lmeval.models._model import Model, State
from pytest_lmeval.scoring._reading import Reading, rows_of

WINDOW = 1024  # tokens of a window where the model names no limit of its own
ROLLING_WINDOW = 2048  # the same in lm-evaluation-harness


@dataclass(frozen=True)
class Plan:
    """How a text is read: state carried in chunks (`window` None), or in windows that forget one another.

    rolling  as lm-evaluation-harness' loglikelihood_rolling reads: the last window is a whole one that ends with the text, and
             what stands before the text is chosen as there (see `data._tokens.beginning`)
    """

    chunk_size: int
    window: int | None = None
    overlap: int = 0
    why: str = "the state is carried"
    rolling: bool = False

    def __str__(self) -> str:
        if self.window is None:
            return f"carried in chunks of {self.chunk_size}"
        return f"windows of {self.window}, {self.how}, in chunks of {self.chunk_size}"

    @property
    def how(self) -> str:
        """How windows overlap, in words."""
        return "as lm_eval reads them" if self.rolling else f"{self.overlap:,} of them read again"


def plan_for(
    lm: Model,
    *,
    chunk_size: int | None = None,
    window: int | Literal["unlimited", "lm_eval"] | None = None,
    overlap: int | None = None,
) -> Plan:
    """How to read with `lm`: carried where it has a state and no limit to its context, else in windows.

    window   tokens of a window; by default the model's context if it is limited, or 1024 if it has no state;
             "unlimited" carries the state past the context that the model was made for;
             "lm_eval" reads as lm-evaluation-harness does, see `rolling_plan`
    overlap  tokens of a window that are only read, not scored; half of it by default
    """
    chunk = default_chunk_size(lm.vocab_size) if chunk_size is None else chunk_size
    if chunk < 1:
        raise StreamError(f"chunk_size is {chunk}; a chunk has at least one token.")
    if window == "lm_eval":
        return rolling_plan(lm, chunk, overlap)
    if window == "unlimited" and not lm.stateful:
        raise StreamError(f"{lm.spec} has no state to carry: it can only be read in windows.")
    if window is None and not lm.stateful:
        window, why = lm.limit or WINDOW, "the model has no state to carry"
    elif window is None and lm.limit is not None:
        window, why = lm.limit, f"the model's context is {lm.limit} tokens"
    else:
        why = "windows were asked for"
    if window is None or window == "unlimited":
        return Plan(chunk)
    overlap = window // 2 if overlap is None else overlap
    return Plan(min(chunk, window) if lm.stateful else window, window, overlap, why)


def rolling_plan(lm: Model, chunk_size: int, overlap: int | None = None) -> Plan:
    """To read as loglikelihood_rolling of lm-evaluation-harness 0.4.13 does, so that its numbers can be had again.

    Its windows do not overlap: each predicts as many tokens as the model's context holds, after one token that is only read,
    which is the prefix token at the beginning. The last one begins so early that it fills the context too, and scores what is
    left. The context is `lm.limit`, or 2048 tokens where the model names none: its HFLM takes, in that case, the
    tokenizer's model_max_length first. For its `max_length=N`, give it `dataclasses.replace(lm, context_length=N)`.

    One of its numbers cannot be had again: where a text repeats itself, so that two windows of a batch read the same tokens but
    score different numbers of them, its HFLM takes the wrong rows of logits for one. With batch_size=1 it does not.

    Raises StreamError for another overlap.
    """
    if overlap:
        raise StreamError(
            f"window='lm_eval' was asked for with overlap={overlap}. The windows of lm-evaluation-harness overlap by its own "
            "rule, so the numbers would not be comparable. Leave overlap out, or say how long a window is: window=1024."
        )
    window = lm.limit or ROLLING_WINDOW
    context = "the model's context" if lm.limit else "its default, as the model names no context"
    why = f"asked for as lm-evaluation-harness reads (loglikelihood_rolling); {window} tokens are {context}"
    return Plan(min(chunk_size, window) if lm.stateful else window, window, 0, why, rolling=True)


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
            ids = TokenReader(self.lm, documents, skip=skip, scored=point.scored, limit=self.tokens, rolling=self.plan.rolling)
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
            point.reading.documents.append(ids.content.hexdigest()[:16])

    def _chunks(self, ids: Iterable[Any], point: Point) -> Iterator[Chunk]:
        if self.plan.window is None:
            return stream(self.lm, ids, chunk_size=self.plan.chunk_size, state=point.state, position=point.scored)
        return stream_in_windows(
            self.lm,
            ids,
            window=self.plan.window,
            overlap=self.plan.overlap,
            anchored=self.plan.rolling,
            chunk_size=self.plan.chunk_size,
            state=point.state,
            position=point.window,
            read_to=point.scored if point.opened else None,
        )

    def _sequences(self) -> Iterator[tuple[int, Iterable[Document]]]:
        documents = self.corpus.documents()
        if not self.by_document:
            yield 0, islice(documents, self.limit)
            return
        for index, (name, parts) in enumerate(islice(groupby(documents, key=attrgetter("name")), self.limit)):
            if self.plan.rolling and not self.corpus.tokenized:  # there, a document is tokenized whole
                yield index, [Document(name, "".join(part.text for part in parts))]
            else:
                yield index, parts
