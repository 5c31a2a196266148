"""How fast a model is, how large, and how well it uses the machine."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.laws.permits import exact_chunk_size
from pytest_lmeval.measures.context import Desk
from pytest_lmeval.models.model import Model

if TYPE_CHECKING:
    from pytest_lmeval.measures._efficiency import EfficiencyResult
    from pytest_lmeval.measures._latency import LatencyResult
    from pytest_lmeval.measures._latency_grid import Grid
    from pytest_lmeval.measures._memory import MemoryResult
    from pytest_lmeval.measures._streaming import StreamingResult
    from pytest_lmeval.measures._throughput import ThroughputResult


def latency(desk: Desk, /, lm: Any, batch_size: int = 1, seq_len: int | None = None, **options: Any) -> LatencyResult:
    """Prefill, time to first token, inter-token latency (see `profiling.latency.latency`).

    In a test that asks for the fixture `benchmark`, pytest-benchmark drives the runs and keeps their times. Where nothing
    was timed (under xdist, or with --benchmark-disable), the record says so, and a test that looks at a time is skipped.
    """

    shape = {"batch_size": batch_size, "seq_len": desk.seq_len(seq_len, 128)}
    return desk.timed("latency", desk.model(lm), {**shape, **options}, latency)


def latency_grid(desk: Desk, /, lm: Any, **options: Any) -> Grid:
    """`latency` at every one of `batch_sizes` and `seq_lens` (see `profiling.grid.latency_grid`), a record each.

    Where the model fails, for example for want of memory, that cell is marked with why, and the others are measured.
    """
    from pytest_lmeval.measures._latency_grid import SEQ_LENS

    def measure(model: Model, **settings: Any) -> LatencyResult:
        return latency(model, **settings, runner=desk.runner())

    model, options = desk.model(lm), {"seq_lens": desk.session.seq_lens or SEQ_LENS, **options}
    grid = latency_grid(model, **options, measure=measure, keep=partial(desk.kept, "latency", model, options))
    if len(grid.failed) == len(grid):
        raise ProfilingError(f"{model.spec} failed in every cell of the grid, first with: {next(iter(grid.failed.values()))}")
    return grid


def throughput(desk: Desk, /, lm: Any, batch_size: int = 32, seq_len: int | None = None, **options: Any) -> ThroughputResult:
    """Tokens a second in batches, and by the size of the batch (see `profiling.throughput.throughput`)."""

    shape = {"batch_size": batch_size, "seq_len": desk.seq_len(seq_len, 512)}
    return desk.timed("throughput", desk.model(lm), {**shape, **options}, throughput)


def streaming(desk: Desk, /, lm: Any, chunk_size: int | None = None, **options: Any) -> StreamingResult:
    """The latency of each chunk of a stream and what the state weighs after it (see `profiling.streaming.streaming`).

    The chunk size is one in which the model was found to be exact: how fast a wrong number comes is of no use.
    """
    from pytest_lmeval.measures._streaming import CHUNK_SIZE

    model = desk.model(lm)
    certificate = desk.session.verdict(model).certificate
    chunk_size = exact_chunk_size(model, certificate, chunk_size, None) or CHUNK_SIZE
    return desk.timed("streaming", model, {"chunk_size": chunk_size, **options}, streaming)


def memory(desk: Desk, /, lm: Any, batch_size: int = 1, seq_len: int | None = None, **options: Any) -> MemoryResult:
    """Weights, state and activations apart, and the peak of a process of its own (see `profiling.memory.memory`).

    Nothing is timed, and other tests do not disturb it: it is measured under xdist too.
    """

    model = desk.model(lm)
    settings = {"batch_size": batch_size, "seq_len": desk.seq_len(seq_len, 128), **options}
    return desk.kept("memory", model, settings, memory(model, **settings))


def efficiency(desk: Desk, /, lm: Any, batch_size: int = 1, seq_len: int | None = None, **options: Any) -> EfficiencyResult:
    """Operations and bytes of a step, and how near to this machine's roofline it runs (see `profiling.efficiency`).

    Timed like `latency`. Where nothing was timed, what is counted is recorded.
    """

    shape = {"batch_size": batch_size, "seq_len": desk.seq_len(seq_len, 128)}
    return desk.timed("efficiency", desk.model(lm), {**shape, **options}, efficiency)
