"""How long a stream takes: the latency of each chunk that is read, and what the state weighs after it.

A model with a constant state reads its last chunk as fast as its first. One with a growing cache does not, and how much slower
it gets is what decides how long a text it can be used for.
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
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model, state_bytes
from pytest_lmeval.profiling._clock import Stopwatch
from pytest_lmeval.profiling._flops import count_flops
from pytest_lmeval.profiling._runner import (
    Runner,
    Timed,
    about_times,
    check_shape,
    measured,
    notes_of,
    quiet,
    too_short,
    unit_of_rates,
)
from pytest_lmeval.profiling._samples import MILLISECONDS, median, spread
from pytest_lmeval.records._measured import Cost, Record, Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value

CHUNK_SIZE, CHUNKS, RUNS, WARM_UP = 256, 32, 3, 1
ENDS = 4  # the first quarter of the chunks is compared with the last


@dataclass(frozen=True, repr=False)
class StreamingResult(Timed):
    """The latency of chunks in milliseconds."""

    @property
    def chunk_latency(self) -> Value:
        return measured(self.record, "chunk_latency")

    @property
    def tokens_per_second(self) -> Value:
        return measured(self.record, "tokens_per_second")

    @property
    def slowdown(self) -> Value:
        """How many times longer a chunk takes late in the stream than early in it: 1 for a constant state."""
        return measured(self.record, "slowdown")

    @property
    def state_bytes(self) -> Series:
        """Bytes of the state by tokens read; counted, so it is there where nothing was timed."""
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
    """The latency of each chunk of a stream, and the size of the state after it: chunks * chunk_size random tokens are read
    `runs` times, the state carried from chunk to chunk.

    chunk_size  256 by default, or one in which the model was found to be exact: how fast a wrong number comes is of no use

    Raises ProfilingError for a model without a state, and for a stream that it cannot read.
    """
    chunk_size = CHUNK_SIZE if chunk_size is None else chunk_size
    check_shape(lm, batch_size=batch_size, seq_len=chunk_size * chunks, runs=runs, warm_up=warm_up)
    if not lm.stateful:
        raise ProfilingError(f"{lm.spec} has no state to carry, so it cannot read a stream. Measure lmeval.latency instead.")
    if chunks < ENDS:
        raise ProfilingError(
            f"chunks is {chunks}: a stream has at least {ENDS}, so that its end can be told from its beginning."
        )
    runner, ids = runner or Runner(), lm.random_ids(batch_size, chunk_size * chunks, seed=seed)
    pieces = list(torch.split(ids, chunk_size, dim=-1))
    engine, about, passes, held = Engine(lm), facts(lm), list[list[float]](), list[int]()
    cold: list[float] = []
    with quiet(threads) as conditions:
        if runner.not_measured is None:
            cold = [sum(read_once(engine, pieces)) for _ in range(warm_up)][:1]
            runner.repeat(lambda: passes.append(read_once(engine, pieces)), runs)
        flops = count_flops(lambda: read_once(engine, pieces, held))
    samples = _samples(passes) if passes else {}
    not_measured = runner.not_measured or too_short(samples["chunk"], lm.device, "reading a chunk")
    tokens = batch_size * chunk_size * chunks
    times = {} if not_measured else _values(passes, samples, tokens, cold, unit_of_rates(lm))
    details = about_times(lm, runner, {"stream": samples.get("stream", [])}, times)
    record = Record(
        kind="streaming",
        subject=f"{chunks} chunks of {chunk_size} tokens" + (f", batch {batch_size}" if batch_size > 1 else ""),
        lm=about,
        settings={
            "chunk_size": chunk_size,
            "chunks": chunks,
            "batch_size": batch_size,
            "runs": runs,
            "warm_up": warm_up,
            "seed": seed,
            **conditions,
        },
        details=details,
        notes=notes_of(details),
        not_measured=not_measured,
        metrics={**times, "state_bytes": value_of("state_bytes", held[-1], n=len(held))},
        cost=Cost(
            seconds=sum(map(sum, passes)),
            tokens=tokens * max(1, len(passes)),
            flops=flops * max(1, len(passes)),
            state_bytes=held[-1],
        ),
        series=_series([] if not_measured else passes, held, chunk_size),
    )
    return StreamingResult(record, {} if not_measured else samples)


def _in_exact_chunks(context: VerbContext, model: Model, settings: dict[str, Any]) -> dict[str, Any]:
    chosen = settings["chunk_size"]
    if not model.stateful or (chosen is not None and chosen < 1):
        return settings  # which are refused as they are
    certificate = context.session.verdict(model).certificate
    policy = policy_for(model, certificate, chunk_size=chosen, window="unlimited", default_chunk=CHUNK_SIZE)
    if not policy.carry:
        raise streaming_refused(model, policy)
    return {**settings, "chunk_size": policy.chunk_size}


streaming = verb_of("streaming", measure_streaming, prepare=_in_exact_chunks)


def read_once(engine: Engine, pieces: list[torch.Tensor], held: list[int] | None = None) -> list[float]:
    """Read the chunks [b, t], one after the other. Returns the seconds of each; the bytes of the states go to `held`."""
    watch = Stopwatch(engine.lm.device)
    for _, state in engine.steps(pieces, keep=1):
        watch.mark()
        if held is not None:
            held.append(state_bytes(state))
    return watch.laps()


def _samples(passes: list[list[float]]) -> dict[str, list[float]]:
    return {"chunk": [time for run in passes for time in run[1:]], "stream": [sum(run) for run in passes]}


def _values(
    passes: list[list[float]], samples: dict[str, list[float]], tokens: int, cold: list[float], rate: str
) -> dict[str, Value]:
    quarter = max(1, len(passes[0]) // ENDS)
    early = np.median([run[1 : 1 + quarter] for run in passes])
    late = np.median([run[-quarter:] for run in passes])
    return {
        "chunk_latency": median("chunk_latency", samples["chunk"]),
        **spread("chunk_latency", samples["chunk"]),
        "tokens_per_second": median("tokens_per_second", [tokens / time for time in samples["stream"]], unit=rate),
        "slowdown": value_of("slowdown", float(late / early), n=len(passes)),
        **({"cold": value_of("cold", MILLISECONDS * cold[0], n=1)} if cold else {}),
    }


def _series(passes: list[list[float]], held: list[int], chunk_size: int) -> dict[str, Series]:
    read = [float(chunk_size * (place + 1)) for place in range(len(held))]
    series = {"state_bytes": Series(read, [float(size) for size in held], "tokens", "bytes", "State over the stream")}
    if passes:
        times = [MILLISECONDS * float(time) for time in np.median(passes, axis=0)]
        series["chunk_latency"] = Series(read, times, "tokens", "ms", "Latency of a chunk over the stream")
    return series
