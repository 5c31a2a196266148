"""Measure throughput: tokens a second of batches of prompts, read and then decoded side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median as median_of

from torch import Tensor

from pytest_lmeval.engine import Engine
from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.measures._context import verb_of
from pytest_lmeval.models._model import Model
from pytest_lmeval.profiling._clock import Stopwatch
from pytest_lmeval.profiling._cost_metrics import ENOUGH
from pytest_lmeval.profiling._failures import attempt
from pytest_lmeval.profiling._runner import Runner, Timed, TimedRuns, check_counts, check_shape, timed_runs
from pytest_lmeval.profiling._samples import median, spread
from pytest_lmeval.records._measured import MetricValue, Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value

SECONDS, WARM_UP, NEW_TOKENS = 10.0, 2, 16
FEWEST, SCALING_RUNS = 3, 3
CURVES = {  # series -> its title, and the metric of its knee
    "batch_scaling": ("Throughput by batch size", "knee_rows"),
    "decode_batch_scaling": ("Throughput of decoding by batch size", "decode_knee_rows"),
}


@dataclass(frozen=True, repr=False)
class ThroughputResult(Timed):
    """Tokens a second. The samples are the times of the batches, and of decoding steps."""

    tokens_per_second = MetricValue()
    """Tokens read in a second, median over the batches."""
    decode_tokens_per_second = MetricValue()
    """Tokens decoded in a second by all rows together, median over the steps; only for models that carry a state."""
    knee = MetricValue("knee_rows")
    """The fewest rows that reach nearly the best rate of any batch size."""

    @property
    def batch_scaling(self) -> Series:
        """Tokens read in a second, by rows in the batch. Sizes that failed are left out; `details["failed"]` says why."""
        return self.record.series["batch_scaling"]


def measure_throughput(
    lm: Model,
    batch_size: int = 32,
    seq_len: int = 512,
    *,
    seconds: float = SECONDS,
    runs: int | None = None,
    warm_up: int = WARM_UP,
    new_tokens: int = NEW_TOKENS,
    scaling: bool = True,
    seed: int = 0,
    threads: int | None = None,
    runner: Runner | None = None,
) -> ThroughputResult:
    """Tokens a second in batches, and by the size of the batch.

    Reads batches of random prompts for `seconds` (or `runs` of them), then decodes `new_tokens` after one of them; with
    `scaling`, does both with each smaller power of two as well, to show where more rows stop helping.

    `record.details["failed"]` names the batch sizes at which the model failed. Raises ProfilingError for a shape that makes no
    sense.
    """
    shape = {"batch_size": batch_size, "seq_len": seq_len, "warm_up": warm_up}
    check_shape(lm, **shape, runs=1 if runs is None else runs)
    check_counts(new_tokens=new_tokens)
    if runs is None and not 0 < seconds < math.inf:
        raise ProfilingError(f"seconds is {seconds}, so there is nothing to measure. It is more than 0, and finite.")
    prompts, steps, series, failed = lm.random_ids(batch_size, seq_len, seed=seed), list[float](), {}, dict[str, str]()
    with timed_runs(lm, runner, threads) as timed:

        def measure() -> None:
            rounds = runs or (lambda fastest: max(FEWEST, math.ceil(seconds / fastest)))
            timed.time(lambda watch: read_once(timed.engine, prompts, watch), rounds, max(1, warm_up))
            timed.count(lambda watch: read_once(timed.engine, prompts, watch))

        failure = attempt(measure)
        if timed.runs and (why := attempt(lambda: steps.extend(_decoding(timed, prompts, new_tokens)))):
            failed["decode"] = why
        if scaling and timed.runner.not_measured is None:
            series = _scaling(timed, prompts, failed)
    times, tokens = [sum(run) for run in timed.runs], batch_size * seq_len
    there_are_times = timed.keep({"batch": times, "decode": steps}, needs="batch", failure=failure)
    record = timed.record(
        "throughput",
        f"batch {batch_size}, {seq_len} tokens",
        {**shape, "seconds": None if runs else seconds, "runs": len(times) or runs, "new_tokens": new_tokens, "seed": seed},
        (_values(timed, batch_size, tokens) if there_are_times else {}) | _knees(series),
        tokens=tokens,
        series=series,
        details={"failed": failed, **({"failure": failure} if failure else {})},
    )
    return ThroughputResult(record, timed.samples)


throughput = verb_of("throughput", measure_throughput)


def read_once(engine: Engine, prompts: Tensor, watch: Stopwatch) -> None:
    engine.prefill(prompts)
    watch.mark()


def _decoding(timed: TimedRuns, prompts: Tensor, new_tokens: int) -> list[float]:
    """Seconds of each step of one token a row after the prompts, without the first one."""
    lm, engine = timed.lm, timed.engine
    room = new_tokens if lm.limit is None else min(new_tokens, lm.limit - prompts.shape[-1] - 1)
    if not lm.stateful or room < 1:
        return []
    token, (_, state) = prompts[..., -1:], engine.prefill(prompts)

    def decode(watch: Stopwatch) -> None:
        for _ in engine.decode(token, state, 1 + room, choose=lambda logits, input_ids: input_ids):
            watch.mark()

    return timed.laps(decode)[1:]


def _values(timed: TimedRuns, rows: int, tokens: int) -> dict[str, Value]:
    times, rate = timed.samples["batch"], timed.unit_of_rates()
    rates = {
        "tokens_per_second": [tokens / time for time in times],
        "decode_tokens_per_second": [rows / step for step in timed.samples.get("decode", [])],
    }
    sustained = value_of("sustained_tokens_per_second", tokens * len(times) / sum(times), n=len(times), unit=rate)
    return {
        **{name: median(name, values, unit=rate) for name, values in rates.items() if values},
        "sustained_tokens_per_second": sustained,
        **timed.cold(),
        "batch_seconds": median("batch_seconds", times),
        **spread("batch_seconds", times),
    }


def _scaling(timed: TimedRuns, prompts: Tensor, failed: dict[str, str]) -> dict[str, Series]:
    """Tokens a second by rows, read and decoded. A size that fails is named in `failed`, and the others are measured."""
    sizes = [1 << power for power in range((len(prompts) - 1).bit_length())] + [len(prompts)]
    read, decoded = dict[float, float](), dict[float, float]()
    for rows in sizes:
        some = prompts[:rows]

        def measure(rows: int = rows, some: Tensor = some) -> None:
            times = [sum(timed.laps(lambda watch: read_once(timed.engine, some, watch))) for _ in range(1 + SCALING_RUNS)]
            read[rows] = rows * some.shape[-1] / median_of(times[1:])
            if steps := _decoding(timed, some, SCALING_RUNS):
                decoded[rows] = rows / median_of(steps)

        if failure := attempt(measure):
            failed[str(rows)] = failure
    return {
        name: Series([float(rows) for rows in curve], list(curve.values()), "rows", timed.unit_of_rates(), title, "x")
        for (name, (title, _)), curve in zip(CURVES.items(), (read, decoded), strict=True)
        if curve
    }


def _knees(series: dict[str, Series]) -> dict[str, Value]:
    """The fewest rows that reach nearly the best rate, of reading and of decoding."""
    found = {}
    for name, curve in series.items():
        metric, enough = CURVES[name][1], ENOUGH * max(curve.y)
        rows = next(rows for rows, rate in zip(curve.x, curve.y, strict=True) if rate >= enough)
        found[metric] = value_of(metric, rows, n=len(curve.x))
    return found
