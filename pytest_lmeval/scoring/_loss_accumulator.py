"""The fold over scored chunks: sums that merge, in constant memory, and the place that the reading has come to.

Every figure of a reading is a ratio of sums over target tokens, so all that is kept are rows of sums
(tokens, nats, bytes, hits) in five arrangements:

    total         one row
    units         one row a document, or a block of one stream: what intervals are drawn from
    chunks        one row a chunk, and the bytes of the state after it: the course of the reading
    by_position   one row a stretch of positions, each half an octave wide
    at_positions  one row of each unit for each chosen position: tokens and nats just before it

Units of a stream and chunks are merged in pairs when there are too many, so a stream of any length fits. Beside them stands how
far the model's fast weights moved (`Moves`), if it has any. With the state and the place after the last chunk, a reading that
was saved (`scoring._resume`) goes on to the same final numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pytest_lmeval.engine import Chunk
from pytest_lmeval.models._model import State

TOP = (1, 5)  # a target counts as hit among the model's first k choices
TOKENS, NATS, BYTES, SECONDS = 0, 1, 2, 3
HITS = {k: 4 + place for place, k in enumerate(TOP)}
COLUMNS = 4 + len(TOP)
STATE = COLUMNS  # column of `LossAccumulator.chunks`: bytes

BLOCK, BLOCKS = 64, 256  # smallest block of a stream, and the number at which neighbours merge
CHUNKS = 2048
HALF_OCTAVES = 128
SPAN, SPAN_BLOCK = 1000, 50  # places up to a chosen position over which its loss is averaged, and of a unit among them
PLACES = 2  # column of `LossAccumulator.at_positions`, after TOKENS and NATS
EACH = 32  # fast weights up to which the course of each is kept, beside that of their mean


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
class LossAccumulator:
    """Sums over everything read so far. `start_document` begins a sequence, `add` takes its chunks in order.

    by_document  whether a unit is a document; otherwise it is a block of consecutive tokens
    positions    places in a sequence at which the loss is wanted (mean over the thousand tokens up to there)
    documents    a hash of each document (or of the stream), appended when it was read
    scored       the last target of the current sequence that was scored: also the last token but one that was read
    window       where the current window begins
    state        after that token, to go on from
    seconds      that the reading took until it was saved
    at_positions [units, positions, 3] sums of tokens and nats, and how many places they are of: a unit is a document that came
                 near one of the positions, or, in a stream, fifty places of the thousand before each
    """

    by_document: bool = False
    positions: tuple[int, ...] = ()
    total: np.ndarray = field(default_factory=lambda: np.zeros(COLUMNS))
    units: list[np.ndarray] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    chunks: list[np.ndarray] = field(default_factory=list)
    by_position: np.ndarray = field(default_factory=lambda: np.zeros((HALF_OCTAVES, COLUMNS)))
    at_positions: list[np.ndarray] = field(default_factory=list)
    block: int = BLOCK  # tokens of a unit, in a stream
    chunks_a_row: int = 1
    chunks_seen: int = 0
    peak_state_bytes: int = 0
    moves: Moves | None = None
    scored: int = 0
    window: int = 0
    state: State = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.by_document and not self.at_positions:
            self.at_positions = [np.zeros((len(self.positions), 3)) for _ in range(SPAN // SPAN_BLOCK)]

    @property
    def tokens(self) -> int:
        """Targets scored so far."""
        return int(self.total[TOKENS])

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk of the current sequence."""
        rows = rows_of(chunk.nll, chunk.rank, chunk.widths, chunk.valid)
        rows_sum = rows.sum(axis=0)
        rows_sum[SECONDS] = chunk.seconds
        self.total += rows_sum
        self.peak_state_bytes = max(self.peak_state_bytes, chunk.state_bytes)
        self.chunks_a_row = append(self.chunks, np.append(rows_sum, chunk.state_bytes), self.chunks_seen, self.chunks_a_row)
        self.chunks_seen += 1
        if self.by_document:
            self.units[-1] += rows_sum
        else:
            self.block = add_to_blocks(self.units, self.block, chunk.start, rows)
        self.scored, self.window, self.state = chunk.end - 1, chunk.window, chunk.state
        places = np.arange(chunk.start, chunk.end)
        bins = np.floor(2 * np.log2(places)).astype(int)
        for bin_ in np.unique(bins):
            self.by_position[bin_] += rows[bins == bin_].sum(axis=0)
        for index, position in enumerate(self.positions):
            near = (places > position - SPAN) & (places <= position)
            if near.any():
                self._add_near(index, rows[near], places[near] - (position - SPAN + 1))

    def _add_near(self, index: int, rows: np.ndarray, offsets: np.ndarray) -> None:
        units = np.full(len(rows), -1) if self.by_document else offsets // SPAN_BLOCK
        sums = np.column_stack([rows[:, TOKENS], rows[:, NATS], np.ones(len(rows))])
        for unit in np.unique(units):
            self.at_positions[unit][index] += sums[units == unit].sum(axis=0)

    def start_document(self) -> None:
        """Begin a sequence, from an empty state."""
        self.scored, self.window, self.state = 0, 0, None
        if self.by_document:
            self.units.append(np.zeros(COLUMNS))
            if self.positions and (not self.at_positions or self.at_positions[-1].any()):  # else the last came near none
                self.at_positions.append(np.zeros((len(self.positions), 3)))

    @property
    def course(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of `chunks`, as an array, and how many chunks each is the sum of: the last one may be of fewer. What they
        are divided by that is a mean over those chunks, of the state's bytes too."""
        each = np.full(len(self.chunks), self.chunks_a_row)
        each[-1:] = self.chunks_seen - self.chunks_a_row * (len(self.chunks) - 1)
        return np.array(self.chunks), each

    def to_json(self) -> dict[str, Any]:
        """Everything but the state, exactly: Python writes and reads floats without losing a bit."""
        return {**plain(replace(self, state=None)), "moves": None if self.moves is None else plain(self.moves)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LossAccumulator:
        reading = cls(**data)
        reading.positions = tuple(reading.positions)
        for name in ("total", "by_position"):
            setattr(reading, name, np.array(data[name]))
        reading.at_positions = [np.array(unit).reshape(-1, 3) for unit in data["at_positions"]]
        reading.units, reading.chunks = list(np.array(data["units"])), list(np.array(data["chunks"]))
        if any(row.shape != (COLUMNS + 1,) for row in reading.chunks):
            raise ValueError(f"rows of chunks have {COLUMNS + 1} columns, and these are of another version")
        reading.moves = None if data["moves"] is None else Moves.from_json(data["moves"])
        return reading


@dataclass
class Moves:
    """How far a model's fast weights moved while it read, stretch by stretch (see `scoring._fast_weights.Watch`), n of them.

    names     of the fast weights
    total     [n] sums of their relative changes over all stretches
    distance  [n] relative to their initial values, at the end of the last stretch
    course    rows of tokens, stretches, and the mean change; then the change of each, if they are not more than `EACH`
    """

    names: tuple[str, ...]
    total: np.ndarray
    distance: np.ndarray
    course: list[np.ndarray] = field(default_factory=list)
    stretches: int = 0
    stretches_a_row: int = 1

    def add(self, tokens: int, change: np.ndarray, distance: np.ndarray) -> None:
        self.total, self.distance = self.total + change, distance
        row = np.array([tokens, 1, change.mean(), *(change if len(change) <= EACH else ())])
        self.stretches_a_row = append(self.course, row, self.stretches, self.stretches_a_row)
        self.stretches += 1

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Moves:
        arrays = {name: np.array(data[name]) for name in ("total", "distance")}
        return cls(**{**data, **arrays, "names": tuple(data["names"]), "course": [np.array(row) for row in data["course"]]})


def add_to_blocks(units: list[np.ndarray], block: int, start: int, rows: np.ndarray) -> int:
    """Add the rows [n, columns] of targets `start`, `start` + 1, ... of one stream to sums of `block` targets each; merge pairs
    of these if they are too many. Returns `block`."""
    while len(rows):
        unit = (start - 1) // block
        if unit == BLOCKS:
            units[:] = [left + right for left, right in zip(units[::2], units[1::2], strict=True)]
            block *= 2
            continue
        fitting = block - (start - 1) % block
        if unit == len(units):
            units.append(np.zeros(rows.shape[1]))
        units[unit] += rows[:fitting].sum(axis=0)
        rows, start = rows[fitting:], start + fitting
    return block


def append(course: list[np.ndarray], row: np.ndarray, seen: int, each: int) -> int:
    """Append the row after `seen` ones to a course of sums of `each` rows; merge pairs if it is too long. Returns `each`."""
    if seen % each:
        course[-1] += row
    elif len(course) < CHUNKS:
        course.append(row.copy())
    else:
        course[:] = [left + right for left, right in zip(course[::2], course[1::2], strict=True)]
        course.append(row.copy())
        each *= 2
    return each


def plain(sums: LossAccumulator | Moves) -> dict[str, Any]:
    """The fields as JSON has them."""
    return {
        name: np.asarray(value).tolist() if isinstance(value, np.ndarray | list | tuple) else value
        for name, value in vars(sums).items()
    }
