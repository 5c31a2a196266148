"""Measure how long each chunk of a stream takes to read, and how many bytes the state has after it.

A model with a constant state reads its last chunk as fast as its first; one with a growing cache slows down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pytest_lmeval.engine import Engine, policy_for
from pytest_lmeval.engine._policy import streaming_refused
from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.measures._context import VerbContext, verb_of
from pytest_lmeval.models._model import Model, state_bytes
from pytest_lmeval.profiling._clock import Stopwatch
from pytest_lmeval.profiling._runner import Runner, Timed, check_shape, timed_runs
from pytest_lmeval.profiling._samples import MILLISECONDS, median, spread
from pytest_lmeval.records._measured import MetricValue, Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value

CHUNK_SIZE, CHUNKS, RUNS, WARM_UP = 256, 32, 3, 1
QUARTERS = 4  # slowdown compares the first quarter of the chunks with the last


@dataclass(frozen=True, repr=False)
class StreamingResult(Timed):
    """The latency of chunks in milliseconds."""

    chunk_latency = MetricValue()
    tokens_per_second = MetricValue()
    slowdown = MetricValue()
    """Time of a chunk late in the stream over that of an early one: 1 for a constant state."""

    @property
    def state_bytes(self) -> Series:
        """Bytes of the state by tokens read; counted, so present where nothing is timed."""
        return self.record.series["state_bytes"]


def measure_streaming(
    lm: Model,
    chunk_size: int | None = None,
    *,
    chunks: int = CHUNKS,
    batch_size: int = 1,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    seed: int = 0,
    threads: int | None = None,
    runner: Runner | None = None,
) -> StreamingResult:
    """The latency of each chunk of a stream, and the size of the state after it: `runs` times, read chunks * chunk_size random
    tokens and carry the state from chunk to chunk.

    chunk_size  256 by default, or one in which the model is exact: the speed of wrong numbers is of no use

    Raises ProfilingError for a model without a state, and for a stream that it cannot read.
    """
    chunk_size = CHUNK_SIZE if chunk_size is None else chunk_size
    check_shape(lm, batch_size=batch_size, seq_len=chunk_size * chunks, runs=runs, warm_up=warm_up)
    if not lm.stateful:
        raise ProfilingError(f"{lm.spec} has no state to carry, so it cannot read a stream. Measure lmeval.latency instead.")
    if chunks < QUARTERS:
        raise ProfilingError(f"chunks is {chunks}; it is at least {QUARTERS}, to compare the end of the stream with its start.")
    pieces = torch.split(lm.random_ids(batch_size, chunk_size * chunks, seed=seed), chunk_size, dim=-1)
    held, settings = list[int](), {"chunk_size": chunk_size, "chunks": chunks, "batch_size": batch_size}
    with timed_runs(lm, runner, threads) as timed:
        timed.time(lambda watch: read_once(timed.engine, pieces, watch), runs, warm_up)
        timed.count(lambda watch: read_once(timed.engine, pieces, watch, held))
    samples = {"chunk": [time for run in timed.runs for time in run[1:]], "stream": [sum(run) for run in timed.runs]}
    passes, tokens = timed.runs if timed.keep(samples, needs="chunk") else [], batch_size * chunk_size * chunks
    values = _values(passes, timed.samples, tokens, timed.unit_of_rates()) | timed.cold() if passes else {}
    record = timed.record(
        "streaming",
        f"{chunks} chunks of {chunk_size} tokens" + (f", batch {batch_size}" if batch_size > 1 else ""),
        {**settings, "runs": runs, "warm_up": warm_up, "seed": seed},
        {**values, "state_bytes": value_of("state_bytes", held[-1], n=len(held))},
        tokens=tokens,
        series=_series(passes, held, chunk_size),
        state_bytes=held[-1],
    )
    return StreamingResult(record, timed.samples)


def _in_exact_chunks(context: VerbContext, model: Model, settings: dict[str, Any]) -> dict[str, Any]:
    chosen = settings["chunk_size"]
    if not model.stateful or (chosen is not None and chosen < 1):
        return settings  # measure_streaming refuses them
    certificate = context.session.verdict(model).certificate
    policy = policy_for(model, certificate, chunk_size=chosen, window="unlimited", default_chunk=CHUNK_SIZE)
    if not policy.carry:
        raise streaming_refused(model, policy)
    return {**settings, "chunk_size": policy.chunk_size}


streaming = verb_of("streaming", measure_streaming, prepare=_in_exact_chunks)


def read_once(engine: Engine, pieces: tuple[torch.Tensor, ...], watch: Stopwatch, held: list[int] | None = None) -> None:
    """Read the chunks [b, t] and mark each; append the bytes of the states to `held`."""
    for _, state in engine.steps(pieces, keep=1):
        watch.mark()
        if held is not None:
            held.append(state_bytes(state))


def _values(passes: list[list[float]], samples: dict[str, list[float]], tokens: int, rate: str) -> dict[str, Value]:
    quarter = len(passes[0]) // QUARTERS
    early = np.median([run[1 : 1 + quarter] for run in passes])
    late = np.median([run[-quarter:] for run in passes])
    return {
        "chunk_latency": median("chunk_latency", samples["chunk"], runs=len(samples["stream"])),
        **spread("chunk_latency", samples["chunk"]),
        "tokens_per_second": median("tokens_per_second", [tokens / time for time in samples["stream"]], unit=rate),
        "slowdown": value_of("slowdown", float(late / early), n=len(passes)),
    }


def _series(passes: list[list[float]], held: list[int], chunk_size: int) -> dict[str, Series]:
    read = [float(chunk_size * (index + 1)) for index in range(len(held))]
    series = {"state_bytes": Series(read, [float(size) for size in held], "tokens", "bytes", "State over the stream")}
    if passes:
        times = (MILLISECONDS * np.median(passes, axis=0)).tolist()
        series["chunk_latency"] = Series(read, times, "tokens", "ms", "Latency of a chunk over the stream")
    return series
