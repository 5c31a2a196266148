"""Latency over a grid of batch sizes and sequence lengths. A cell that fails says why, and the others are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.identity import facts
from pytest_lmeval.lm import Model
from pytest_lmeval.profiling.failures import attempt
from pytest_lmeval.profiling.latency import LatencyResult, latency
from pytest_lmeval.profiling.runner import ProfilingError
from pytest_lmeval.results.record import Record

BATCH_SIZES, SEQ_LENS = (1,), (128, 512)


@dataclass(frozen=True)
class Grid(Mapping[tuple[int, int], LatencyResult]):
    """Results by (batch size, sequence length).

    grid[1, 512].ttft    raises ProfilingError where that cell failed
    grid.failed          why, by cell
    """

    cells: dict[tuple[int, int], LatencyResult]

    def __getitem__(self, shape: tuple[int, int]) -> LatencyResult:
        return self.cells[shape]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def failed(self) -> dict[tuple[int, int], str]:
        """What could not be measured, and why."""
        return {shape: why for shape, cell in self.cells.items() if (why := cell.record.settings.get("failure"))}


def latency_grid(
    lm: Model,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seq_lens: Sequence[int] = SEQ_LENS,
    measure: Callable[..., LatencyResult] = latency,
    **options: Any,
) -> Grid:
    """`latency` at every batch size and sequence length, with the same options; the smallest first.

    Raises ProfilingError if there is no cell at all.
    """
    shapes = sorted({(rows, tokens) for rows in batch_sizes for tokens in seq_lens}, key=lambda shape: shape[0] * shape[1])
    if not shapes:
        raise ProfilingError("the grid has no cells: give at least one batch size and one sequence length.")
    return Grid({shape: _cell(lm, *shape, measure, options) for shape in shapes})


def _cell(
    lm: Model, batch_size: int, seq_len: int, measure: Callable[..., LatencyResult], options: dict[str, Any]
) -> LatencyResult:
    found: list[LatencyResult] = []
    why = attempt(lambda: found.append(measure(lm, batch_size=batch_size, seq_len=seq_len, **options)))
    if why is None:
        return found[0]
    shape = {"batch_size": batch_size, "seq_len": seq_len}
    return LatencyResult(
        Record(
            kind="latency",
            subject=f"batch {batch_size}, {seq_len} tokens",
            lm=facts(lm),
            settings={**shape, "failure": why, "not_measured": why},
        )
    )
