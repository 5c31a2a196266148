"""Latency over a grid of batch sizes and sequence lengths. A cell that fails says why, and the others are measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.measures._context import current, verb
from pytest_lmeval.measures._latency import NEW_TOKENS, RUNS, WARM_UP, LatencyResult, measure_latency
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model
from pytest_lmeval.profiling._failures import DEVICE_LOST, attempt
from pytest_lmeval.profiling._runner import check_shape
from pytest_lmeval.records._measured import ModelFacts, Record

BATCH_SIZES, SEQ_LENS = (1,), (128, 512)


@verb
def latency_grid(
    lm: Any,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seq_lens: Sequence[int] | None = None,
    new_tokens: int = NEW_TOKENS,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    seed: int = 0,
    threads: int | None = None,
) -> Grid:
    """`latency` at every one of `batch_sizes` and `seq_lens`, a record each.

    Where the model fails, for example for want of memory, that cell is marked with why, and the others are measured.
    """
    context = current()
    options: dict[str, Any] = {"new_tokens": new_tokens, "runs": runs, "warm_up": warm_up, "seed": seed, "threads": threads}
    shapes = {"batch_sizes": batch_sizes, "seq_lens": context.session.seq_lens or SEQ_LENS if seq_lens is None else seq_lens}
    model = context.model(lm)

    def measure(model: Model, **settings: Any) -> LatencyResult:
        return measure_latency(model, **settings, runner=context.runner())

    keep = partial(context.kept, "latency", model, {**shapes, **options})
    grid = measure_latency_grid(model, **shapes, **options, measure=measure, keep=keep)
    if len(grid.failed) == len(grid):
        raise ProfilingError(f"{model.spec} failed in every cell of the grid, first with: {next(iter(grid.failed.values()))}")
    return grid


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
        return {shape: why for shape, cell in self.cells.items() if (why := cell.record.details.get("failure"))}


def measure_latency_grid(
    lm: Model,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seq_lens: Sequence[int] = SEQ_LENS,
    measure: Callable[..., LatencyResult] = measure_latency,
    keep: Callable[[LatencyResult], LatencyResult] = lambda cell: cell,
    **options: Any,
) -> Grid:
    """`latency` at every batch size and sequence length, with the same options; the smallest first.

    keep  is given each cell as soon as it is done, to write it down; what it returns stands in the grid

    After a lost device, the cells that are left are marked so too. Raises ProfilingError if there is no cell at all, TypeError
    and ProfilingError for options that no cell could be measured with.
    """
    shapes = sorted({(rows, tokens) for rows in batch_sizes for tokens in seq_lens}, key=lambda shape: shape[0] * shape[1])
    if not shapes:
        raise ProfilingError("the grid has no cells: give at least one batch size and one sequence length.")
    chosen = inspect.signature(measure_latency).bind(lm, **options).arguments
    common = {name: chosen[name] for name in ("runs", "warm_up") if name in chosen}
    unlimited = replace(lm, context_length=None, found_limit=None)
    check_shape(unlimited, batch_size=1, seq_len=1, new_tokens=chosen.get("new_tokens", 1), **common)
    about, lost, cells = facts(lm), None, {}
    for shape in shapes:
        cell = _failed(shape, about, lost) if lost else _cell(lm, shape, about, measure, options)
        cells[shape] = keep(cell)
        failure = cell.record.details.get("failure")
        lost = failure if failure and failure.startswith(DEVICE_LOST) else lost
    return Grid(cells)


def _cell(
    lm: Model, shape: tuple[int, int], about: ModelFacts, measure: Callable[..., LatencyResult], options: dict[str, Any]
) -> LatencyResult:
    found: list[LatencyResult] = []
    why = attempt(lambda: found.append(measure(lm, batch_size=shape[0], seq_len=shape[1], **options)))
    return found[0] if why is None else _failed(shape, about, why)


def _failed(shape: tuple[int, int], about: ModelFacts, why: str) -> LatencyResult:
    record = Record(
        kind="latency",
        subject=f"batch {shape[0]}, {shape[1]} tokens",
        lm=about,
        settings={"batch_size": shape[0], "seq_len": shape[1]},
        details={"failure": why},
        not_measured=why,
    )
    return LatencyResult(record)
