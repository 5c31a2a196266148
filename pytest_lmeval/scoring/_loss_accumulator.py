"""Sum the scores of chunks, in constant memory, and remember where to resume.

Every metric of a text is a ratio of sums over targets, so only rows of sums (tokens, nats, bytes, hits) are kept. Saved with
the state after the last chunk (`scoring._text_files`), they resume to exactly the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import numpy as np

from pytest_lmeval.engine import Chunk
from pytest_lmeval.models._model import State

TOP = (1, 5)  # a target is a hit if it is among the model's first k choices
TOKENS, NATS, BYTES, SECONDS = 0, 1, 2, 3
HITS = {k: 4 + index for index, k in enumerate(TOP)}
COLUMNS = 4 + len(TOP)
STATE = COLUMNS  # column of `LossAccumulator.chunks`: bytes
UNIT_COLUMNS = {"tokens": TOKENS, "nats": NATS, "bytes": BYTES, **{f"top{k}": column for k, column in HITS.items()}}

BLOCK, BLOCKS = 64, 256  # targets of the smallest block, and the number of blocks at which neighbours merge
CHUNKS = 2048  # rows at which neighbouring chunks merge
HALF_OCTAVES = 128
SPAN, MISSING = 1000, 50  # positions before a chosen one over which its loss is averaged, and how many of them may be missing
POSITIONS = 2  # column of `LossAccumulator.at_positions`, after TOKENS and NATS
MOST_CURVES = 32  # fast weights up to which each has its own curve, beside that of their mean


def rows_of(nll: np.ndarray, rank: np.ndarray, widths: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Rows [n, columns] of single targets; of frames [n, s], the sums over the valid targets of each."""
    rows, codes = np.zeros((len(nll), COLUMNS)), tuple(range(1, nll.ndim))
    valid = np.ones(nll.shape, dtype=bool) if valid is None else valid
    rows[:, TOKENS], rows[:, NATS] = valid.sum(axis=codes), np.where(valid, nll, 0.0).sum(axis=codes)
    rows[:, BYTES] = widths
    for k, column in HITS.items():
        rows[:, column] = (valid & (rank < k)).sum(axis=codes)
    return rows


@dataclass
class Beginning:
    """The beginning of the current sequence, kept to be read a second time, and what the second readings of all sequences
    found (see `measures._text_audit`).

    ids, nll    its tokens [n], or frames [n, k], and the losses of its targets, in parts
    held        the number of tokens, of which `scored` targets have a loss
    complete    no more of it is kept
    again       targets of it that were read again
    tokens      targets of the longest beginning that was read again
    difference  the largest difference of a loss between two readings, nats
    work        tokens and calls of the second readings, in tokens
    seconds     that they took
    peak_bytes  memory of the device before they began: what they use is not counted as the measurement's
    """

    ids: list[np.ndarray] = field(default_factory=list)
    nll: list[np.ndarray] = field(default_factory=list)
    held: int = 0
    scored: int = 0
    complete: bool = False
    again: int = 0
    tokens: int = 0
    difference: float = 0.0
    work: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def start(self) -> None:
        """Begin a sequence."""
        self.drop()
        self.complete, self.again = False, 0

    def hold(self, ids: np.ndarray) -> None:
        self.ids.append(ids)
        self.held += len(ids)

    def score(self, nll: np.ndarray) -> None:
        self.nll.append(nll)
        self.scored += len(nll)

    def drop(self) -> None:
        """Keep no more of the sequence."""
        self.ids, self.nll, self.held, self.scored, self.complete = [], [], 0, 0, True

    def to_json(self) -> dict[str, Any]:
        """The losses exactly, and the tokens that belong to them."""
        ids, nll = ([] if not parts else np.concatenate(parts).tolist() for parts in (self.ids, self.nll))
        ids = ids[: self.scored + 1]
        return {**vars(self), "ids": ids, "nll": nll, "held": len(ids)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Beginning:
        parts = {name: [np.array(data[name], dtype)] * bool(data[name]) for name, dtype in (("ids", int), ("nll", float))}
        return cls(**{**data, **parts})


@dataclass
class LossAccumulator:
    """Sums over all chunks so far. `start_document` begins a sequence, `add` takes its chunks in order.

    by_document   whether a unit is a document; otherwise it is a block of consecutive targets
    positions     positions whose loss is measured (mean over the thousand targets up to each)
    total, units  one row, and one row for each unit, from which intervals are drawn; pairs of too many blocks are merged
    documents     a hash of each document (or of the stream) that was read to its end
    numbers       of these documents, in the corpus
    skipped       documents without a target
    ahead         number of the first of the documents that are read side by side with the current one
    special_tokens   special tokens that are written in the texts that were read to their end
    chunks        one row for each chunk (merged like blocks), with the bytes of the state after it
    by_position   one row for each range of positions, half an octave wide
    at_positions  [units, positions, 3] sums of tokens and nats, and the number of their positions: a unit is a document with
                  targets just before one of the positions, or the stream
    scored        position of the last scored target of the current sequence; the token before it was read last
    window        position at which the current window begins
    seconds       until the sums were saved
    beginning     of the current sequence, to be read a second time
    """

    by_document: bool = False
    positions: tuple[int, ...] = ()
    total: np.ndarray = field(default_factory=lambda: np.zeros(COLUMNS))
    units: list[np.ndarray] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    skipped: int = 0
    ahead: int = 0
    special_tokens: int = 0
    chunks: list[np.ndarray] = field(default_factory=list)
    by_position: np.ndarray = field(default_factory=lambda: np.zeros((HALF_OCTAVES, COLUMNS)))
    at_positions: list[np.ndarray] = field(default_factory=list)
    block: int = BLOCK
    chunks_per_row: int = 1
    chunks_seen: int = 0
    peak_state_bytes: int = 0
    fast_weights: FastWeightSums | None = None
    scored: int = 0
    window: int = 0
    state: State = None
    seconds: float = 0.0
    beginning: Beginning = field(default_factory=Beginning)

    def __post_init__(self) -> None:
        if self.positions and not self.by_document and not self.at_positions:
            self.at_positions = [np.zeros((len(self.positions), 3))]

    @property
    def tokens(self) -> int:
        """The number of scored targets."""
        return int(self.total[TOKENS])

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk of the current sequence."""
        rows = rows_of(chunk.nll, chunk.rank, chunk.widths, chunk.valid)
        rows_sum = rows.sum(axis=0)
        rows_sum[SECONDS] = chunk.seconds
        self.total += rows_sum
        self.peak_state_bytes = max(self.peak_state_bytes, chunk.state_bytes)
        self.chunks_seen += 1
        row = np.append(rows_sum, chunk.state_bytes)[None]
        self.chunks_per_row = add_to_blocks(self.chunks, self.chunks_per_row, self.chunks_seen, row, CHUNKS)
        if self.by_document:
            self.units[-1] += rows_sum
        else:
            self.block = add_to_blocks(self.units, self.block, chunk.start, rows)
        self.scored, self.window, self.state = chunk.end - 1, chunk.window, chunk.state
        positions = np.arange(chunk.start, chunk.end)
        bins = np.floor(2 * np.log2(positions)).astype(int)
        for bin_ in np.unique(bins):
            self.by_position[bin_] += rows[bins == bin_].sum(axis=0)
        for index, position in enumerate(self.positions):
            near = (positions > position - SPAN) & (positions <= position)
            self.at_positions[-1][index] += np.append(rows[near][:, [TOKENS, NATS]].sum(axis=0), near.sum())

    def start_document(self) -> None:
        """Begin a sequence, with an empty state."""
        self.scored, self.window, self.state = 0, 0, None
        self.beginning.start()
        if self.by_document:
            self.units.append(np.zeros(COLUMNS))
            if self.positions and (not self.at_positions or self.at_positions[-1].any()):  # else reuse the last, empty one
                self.at_positions.append(np.zeros((len(self.positions), 3)))

    def end_document(self, content: str, number: int = 0) -> None:
        """End a sequence whose content has this hash; one whose frames had no code to predict counts as skipped.

        number  of the document, in the corpus"""
        if self.by_document and not self.units[-1][TOKENS]:
            self.units.pop()
            self.skipped += 1
        else:
            self.documents.append(content)
            self.numbers.append(number)

    @classmethod
    def merged(cls, parts: Sequence[LossAccumulator]) -> LossAccumulator:
        """The sums of a text of which each part holds a share of the documents, or of the windows of a stream, without a state.
        For its chunks stand its units: each part had an order of its own."""
        whole, first = cls(parts[0].by_document, parts[0].positions), parts[0]
        for name in ("total", "by_position", "skipped"):
            setattr(whole, name, sum((getattr(part, name) for part in parts[1:]), getattr(first, name)))
        whole.peak_state_bytes = max(part.peak_state_bytes for part in parts)
        if whole.by_document:
            units = [one for part in parts for one in zip(part.numbers, part.documents, part.units, strict=True)]
            units.sort(key=itemgetter(0))
            whole.numbers, whole.documents, whole.units = map(list, zip(*units, strict=True)) if units else ([], [], [])
            whole.at_positions = [row for part in parts for row in part.at_positions]
            whole.special_tokens = sum(part.special_tokens for part in parts)
        else:
            whole.units, whole.block = merge_blocks([(part.units, part.block) for part in parts])
            whole.at_positions = [sum(rows[1:], rows[0]) for rows in zip(*(part.at_positions for part in parts), strict=True)]
            whole.documents, whole.numbers, whole.special_tokens = first.documents, first.numbers, first.special_tokens
        whole.chunks_seen = len(whole.units)
        for number, unit in enumerate(whole.units, start=1):
            row = np.append(unit, 0.0)[None]
            whole.chunks_per_row = add_to_blocks(whole.chunks, whole.chunks_per_row, number, row, CHUNKS)
        return whole

    @property
    def history(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of `chunks` as an array, and the number of chunks that each sums, by which seconds and bytes are divided."""
        counts = np.full(len(self.chunks), self.chunks_per_row)
        counts[-1:] = self.chunks_seen - self.chunks_per_row * (len(self.chunks) - 1)
        return np.array(self.chunks), counts

    @property
    def near_positions(self) -> np.ndarray:
        """Tokens and nats [units, positions, 2] before each position; zero for a text without a target among the last fifty."""
        rows = np.array(self.at_positions).reshape(len(self.at_positions), len(self.positions), POSITIONS + 1)
        enough = np.maximum(0, np.minimum(SPAN, self.positions) - MISSING)
        return np.where((rows[..., POSITIONS] > enough)[..., None], rows[..., :POSITIONS], 0.0)

    def to_json(self) -> dict[str, Any]:
        """Everything but the state, exactly: JSON keeps every bit of a float."""
        parts = {"fast_weights": self.fast_weights and plain(self.fast_weights), "beginning": self.beginning.to_json()}
        return {**plain(replace(self, state=None)), **parts}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LossAccumulator:
        arrays = {name: np.array(data[name]) for name in ("total", "by_position")}
        rows = {name: list(np.array(data[name])) for name in ("units", "chunks", "at_positions")}
        if any(row.shape != (COLUMNS + 1,) for row in rows["chunks"]):
            raise ValueError(f"rows of chunks have {COLUMNS + 1} columns, and these are of another version")
        fast_weights = data["fast_weights"] and FastWeightSums.from_json(data["fast_weights"])
        parts = {"fast_weights": fast_weights, "beginning": Beginning.from_json(data["beginning"])}
        return cls(**{**data, **arrays, **rows, **parts, "positions": tuple(data["positions"])})


@dataclass
class FastWeightSums:
    """How much the n fast weights of a model changed from each measurement to the next (see `scoring._fast_weights`).

    names     of the fast weights
    change    [n] sums of their relative changes over all measurements
    distance  [n] relative to their initial values, at the last measurement
    history   rows of tokens, measurements, and the mean change; then the change of each, if they are at most `MOST_CURVES`
    """

    names: tuple[str, ...]
    change: np.ndarray
    distance: np.ndarray
    history: list[np.ndarray] = field(default_factory=list)
    measurements: int = 0
    measurements_per_row: int = 1

    def add(self, tokens: int, change: np.ndarray, distance: np.ndarray) -> None:
        self.change, self.distance = self.change + change, distance
        row = np.array([[tokens, 1, change.mean(), *(change if len(change) <= MOST_CURVES else ())]])
        self.measurements += 1
        self.measurements_per_row = add_to_blocks(self.history, self.measurements_per_row, self.measurements, row, CHUNKS)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FastWeightSums:
        arrays = {name: np.array(data[name]) for name in ("change", "distance")}
        return cls(**{**data, **arrays, "names": tuple(data["names"]), "history": list(np.array(data["history"]))})


def add_to_blocks(units: list[np.ndarray], block: int, start: int, rows: np.ndarray, most: int = BLOCKS) -> int:
    """Add rows [n, columns], of which the first has number `start` (from 1), to sums of `block` rows each; merge pairs of more
    than `most` sums. Returns the new `block`."""
    while len(rows):
        unit = (start - 1) // block
        if unit == most:
            units[:] = [left + right for left, right in zip(units[::2], units[1::2], strict=True)]
            block *= 2
            continue
        fitting = block - (start - 1) % block
        while unit >= len(units):
            units.append(np.zeros(rows.shape[1]))
        units[unit] += rows[:fitting].sum(axis=0)
        rows, start = rows[fitting:], start + fitting
    return block


def merge_blocks(parts: Sequence[tuple[list[np.ndarray], int]]) -> tuple[list[np.ndarray], int]:
    """The sums of blocks of one stream of which each part, (sums, length of a block), holds some of the rows; and the length of
    a block, which is the longest of those of the parts."""
    block, found = max(size for _, size in parts), list[np.ndarray]()
    for units, size in parts:
        for number, unit in enumerate(units):
            while number * size // block >= len(found):
                found.append(np.zeros_like(unit))
            found[number * size // block] += unit
    return found, block


def plain(sums: LossAccumulator | FastWeightSums) -> dict[str, Any]:
    """The fields as JSON has them."""
    return {
        name: np.asarray(value).tolist() if isinstance(value, np.ndarray | list | tuple) else value
        for name, value in vars(sums).items()
    }
