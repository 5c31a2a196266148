"""The fold over scored chunks: sums that merge, in constant memory.

Every figure of a reading is a ratio of sums over target tokens, so all that is kept are rows of sums
(tokens, nats, bytes, hits) in four arrangements:

    total        one row
    units        one row a document, or a block of one stream: what intervals are drawn from
    chunks       one row a chunk: the course of the reading
    by_position  one row a stretch of positions, each half an octave wide

Units of a stream and chunks are merged in pairs when there are too many, so a stream of any length fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TOP = (1, 5)  # a target counts as hit among the model's first k choices
TOKENS, NATS, BYTES, SECONDS = 0, 1, 2, 3
HITS = {k: 4 + place for place, k in enumerate(TOP)}
COLUMNS = 4 + len(TOP)

BLOCK, BLOCKS = 64, 256  # smallest block of a stream, and the number at which neighbours merge
CHUNKS = 2048
HALF_OCTAVES = 128
SPAN = 1000  # tokens up to a chosen position over which its loss is averaged


def rows_of(nll: np.ndarray, rank: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Rows [n, columns] of single targets."""
    rows = np.zeros((len(nll), COLUMNS))
    rows[:, TOKENS], rows[:, NATS], rows[:, BYTES] = 1, nll, widths
    for k, column in HITS.items():
        rows[:, column] = rank < k
    return rows


@dataclass
class Reading:
    """Sums over everything read so far. `add` takes chunks in order; `end_document` closes a document.

    by_document  whether a unit is a document; otherwise it is a block of consecutive tokens
    positions    places in a sequence at which the loss is wanted (mean over the thousand tokens up to there)
    """

    by_document: bool = False
    positions: tuple[int, ...] = ()
    total: np.ndarray = field(default_factory=lambda: np.zeros(COLUMNS))
    units: list[np.ndarray] = field(default_factory=list)
    chunks: list[np.ndarray] = field(default_factory=list)
    by_position: np.ndarray = field(default_factory=lambda: np.zeros((HALF_OCTAVES, COLUMNS)))
    at_positions: np.ndarray = field(default_factory=lambda: np.zeros((0, COLUMNS)))
    block: int = BLOCK  # tokens of a unit, in a stream
    chunks_a_row: int = 1
    chunks_seen: int = 0
    peak_state_bytes: int = 0

    def __post_init__(self) -> None:
        if not len(self.at_positions):
            self.at_positions = np.zeros((len(self.positions), COLUMNS))

    def add(self, start: int, rows: np.ndarray, *, seconds: float, state_bytes: int) -> None:
        """Take the rows of targets `start`, `start` + 1, ... of the current sequence."""
        rows_sum = rows.sum(axis=0)
        rows_sum[SECONDS] = seconds
        self.total += rows_sum
        self.peak_state_bytes = max(self.peak_state_bytes, state_bytes)
        self._add_chunk(rows_sum)
        self._add_unit(start, rows, rows_sum)
        places = np.arange(start, start + len(rows))
        bins = np.floor(2 * np.log2(places)).astype(int)
        for bin_ in np.unique(bins):
            self.by_position[bin_] += rows[bins == bin_].sum(axis=0)
        for index, position in enumerate(self.positions):
            near = (places > position - SPAN) & (places <= position)
            self.at_positions[index] += rows[near].sum(axis=0)

    def start_document(self) -> None:
        if self.by_document:
            self.units.append(np.zeros(COLUMNS))

    def _add_unit(self, start: int, rows: np.ndarray, rows_sum: np.ndarray) -> None:
        if self.by_document:
            self.units[-1] += rows_sum
            return
        while len(rows):
            unit = (start - 1) // self.block
            if unit == BLOCKS:
                self.units = [left + right for left, right in zip(self.units[::2], self.units[1::2], strict=True)]
                self.block *= 2
                continue
            fitting = self.block - (start - 1) % self.block
            if unit == len(self.units):
                self.units.append(np.zeros(COLUMNS))
            self.units[unit] += rows[:fitting].sum(axis=0)
            rows, start = rows[fitting:], start + fitting

    def _add_chunk(self, rows_sum: np.ndarray) -> None:
        if self.chunks_seen % self.chunks_a_row:
            self.chunks[-1] += rows_sum
        elif len(self.chunks) < CHUNKS:
            self.chunks.append(rows_sum.copy())
        else:
            self.chunks = [left + right for left, right in zip(self.chunks[::2], self.chunks[1::2], strict=True)]
            self.chunks.append(rows_sum.copy())
            self.chunks_a_row *= 2
        self.chunks_seen += 1

    def to_json(self) -> dict[str, Any]:
        """Everything, exactly: Python writes and reads floats without losing a bit."""
        return {
            name: np.asarray(value).tolist() if isinstance(value, np.ndarray | list | tuple) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reading:
        reading = cls(**data)
        reading.positions = tuple(reading.positions)
        for name in ("total", "by_position"):
            setattr(reading, name, np.array(data[name]))
        reading.at_positions = np.array(data["at_positions"]).reshape(-1, COLUMNS)
        reading.units, reading.chunks = list(np.array(data["units"])), list(np.array(data["chunks"]))
        return reading
