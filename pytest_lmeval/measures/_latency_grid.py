"""Measure latency over a grid of batch sizes and sequence lengths."""

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
from pytest_lmeval.records._measured import Record

BATCH_SIZES, SEQ_LENS = (1,), (128, 512)
Shape = tuple[int, int]


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

    A cell at which the model fails, for example for lack of memory, says why, and the others are measured.
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
class Grid(Mapping[Shape, LatencyResult]):
    """Results by (batch size, sequence length): `grid[1, 512].ttft` raises ProfilingError where that cell failed."""

    cells: dict[Shape, LatencyResult]

    def __getitem__(self, shape: Shape) -> LatencyResult:
        return self.cells[shape]

    def __iter__(self) -> Iterator[Shape]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def failed(self) -> dict[Shape, str]:
        """The reasons why cells were not measured, by cell."""
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
    """`latency` at every batch size and sequence length with the same options, the smallest first.

    keep  is given each cell as soon as it is measured, to write it down; the grid holds what it returns

    After a lost device, the remaining cells fail with it. Raises ProfilingError for a grid without cells, and TypeError and
    ProfilingError for options that fit no cell.
    """
    shapes = sorted({(rows, tokens) for rows in batch_sizes for tokens in seq_lens}, key=lambda shape: shape[0] * shape[1])
    if not shapes:
        raise ProfilingError("the grid has no cells: give at least one batch size and one sequence length.")
    given = inspect.signature(measure_latency).bind(lm, **options).arguments
    unlimited = replace(lm, context_length=None, found_limit=None)
    checked = {name: given[name] for name in ("new_tokens", "runs", "warm_up") if name in given}
    check_shape(unlimited, batch_size=1, seq_len=1, **checked)
    about, lost, cells = facts(lm), "", dict[Shape, LatencyResult]()
    for rows, tokens in shapes:
        shape, found = {"batch_size": rows, "seq_len": tokens}, list[LatencyResult]()
        run = partial(measure, lm, **shape, **options)
        if why := lost or attempt(lambda: found.append(run())):  # noqa: B023 - called at once
            subject, details = f"batch {rows}, {tokens} tokens", {"failure": why}
            record = Record(kind="latency", subject=subject, lm=about, settings=shape, details=details, not_measured=why)
            found = [LatencyResult(record)]
            lost = why if why.startswith(DEVICE_LOST) else ""
        cells[rows, tokens] = keep(found[0])
    return Grid(cells)
