"""How much a model gets done when it is kept busy: batches of prompts read one after the other, and decoded side by side.

The batch is also doubled from one row up, to see where more rows stop helping.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from torch import Tensor

from pytest_lmeval.engine import Engine
from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.measures._context import verb_of
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model
from pytest_lmeval.profiling._clock import Stopwatch
from pytest_lmeval.profiling._cost_metrics import ENOUGH
from pytest_lmeval.profiling._failures import attempt
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

SECONDS, WARM_UP, NEW_TOKENS = 10.0, 2, 16
FEWEST, SCALING_RUNS = 3, 3
TITLES = ("Throughput by batch size", "Throughput of decoding by batch size")


@dataclass(frozen=True, repr=False)
class ThroughputResult(Timed):
    """Tokens a second. The samples are the times of the batches, and of steps that decode."""

    @property
    def tokens_per_second(self) -> Value:
        """Tokens read in a second, median over the batches."""
        return measured(self.record, "tokens_per_second")

    @property
    def decode_tokens_per_second(self) -> Value:
        """Tokens written in a second by all rows together, median over the steps; only for models that carry a state."""
        return measured(self.record, "decode_tokens_per_second")

    @property
    def batch_scaling(self) -> Series:
        """Tokens read in a second, by rows in the batch. Sizes that failed are left out; `details["failed"]` says why."""
        return self.record.series["batch_scaling"]

    @property
    def knee(self) -> Value:
        """The fewest rows that are nearly as good as any number of them."""
        return measured(self.record, "knee_rows")


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
    `scaling`, also does both with each smaller power of two.

    A batch size at which the model fails (it may not fit into memory) is recorded as that, and the others are measured: what
    `failed` of the details says. Raises ProfilingError where a shape makes no sense.
    """
    _check(lm, batch_size, seq_len, seconds, runs, warm_up, new_tokens)
    runner, prompts, about = runner or Runner(), lm.random_ids(batch_size, seq_len, seed=seed), facts(lm)
    engine = Engine(lm)
    tried, times, flops, failed = list[float](), list[float](), list[int](), dict[str, str]()

    def measure() -> None:
        if runner.not_measured is None:
            tried.extend(step_once(engine, prompts) for _ in range(max(1, warm_up)))
            rounds = runs or max(FEWEST, math.ceil(seconds / min(tried)))
            runner.repeat(lambda: times.append(step_once(engine, prompts)), rounds)
        flops.append(count_flops(lambda: step_once(engine, prompts)))  # a run of its own: counting takes time

    with quiet(threads) as conditions:
        failure = attempt(measure)
        steps = _decode(engine, prompts, new_tokens, failed) if times else []
        series = _scaling(engine, prompts, failed) if scaling and runner.not_measured is None else {}
    not_measured = failure or runner.not_measured or too_short(times, lm.device, "reading a batch")
    values = {} if not_measured else _values(times, steps, tried[0], batch_size, seq_len, unit_of_rates(lm))
    about_failures = {"failed": failed, **({"failure": failure} if failure else {})}
    details = {**about_failures, **about_times(lm, runner, {"batch": times}, values)}
    record = Record(
        kind="throughput",
        subject=f"batch {batch_size}, {seq_len} tokens",
        lm=about,
        settings={
            "batch_size": batch_size,
            "seq_len": seq_len,
            "seconds": None if runs else seconds,
            "runs": len(times) or runs,
            "warm_up": warm_up,
            "new_tokens": new_tokens,
            "seed": seed,
            **conditions,
        },
        details=details,
        notes=notes_of(details),
        not_measured=not_measured,
        metrics=values | _knee(series),
        cost=Cost(
            seconds=sum(times),
            tokens=len(times) * batch_size * seq_len,
            flops=flops[0] * max(1, len(times)) if flops else None,
        ),
        series=series,
    )
    return ThroughputResult(record, {} if not_measured else {"batch": times, "decode": steps})


throughput = verb_of("throughput", measure_throughput)


def _check(lm: Model, batch_size: int, seq_len: int, seconds: float, runs: int | None, warm_up: int, new_tokens: int) -> None:
    check_shape(lm, batch_size=batch_size, seq_len=seq_len, runs=1 if runs is None else runs, warm_up=warm_up)
    if new_tokens < 1:
        raise ProfilingError(f"new_tokens is {new_tokens}: then there is nothing to measure. It is at least 1.")
    if runs is None and not 0 < seconds < math.inf:
        raise ProfilingError(f"seconds is {seconds}: then there is nothing to measure. It is more than 0.")


def step_once(engine: Engine, prompts: Tensor) -> float:
    """Seconds of one step over prompts [b, t]."""
    watch = Stopwatch(engine.lm.device)
    engine.prefill(prompts)
    watch.mark()
    return watch.laps()[0]


def _decode(engine: Engine, prompts: Tensor, new_tokens: int, failed: dict[str, str]) -> list[float]:
    """The times of `_decoding`. Where it fails, or they are too short for the clock, `failed` says so and there are none."""
    steps = list[float]()
    why = attempt(lambda: steps.extend(_decoding(engine, prompts, new_tokens)))
    if why or (steps and (why := too_short(steps, engine.lm.device, "decoding a token of each row"))):
        failed["decode"] = why
        return []
    return steps


def _decoding(engine: Engine, prompts: Tensor, new_tokens: int) -> list[float]:
    """Seconds of each step of one token a row, after the prompts and a first one that is not counted."""
    lm = engine.lm
    room = new_tokens if lm.limit is None else min(new_tokens, lm.limit - prompts.shape[-1] - 1)
    if not lm.stateful or room < 1:
        return []
    token, (_, state) = prompts[..., -1:], engine.prefill(prompts)
    watch = Stopwatch(lm.device)
    for _ in engine.decode(token, state, 1 + room, choose=lambda logits, input_ids: input_ids):
        watch.mark()
    return watch.laps()[1:]


def _values(times: list[float], steps: list[float], cold: float, batch_size: int, seq_len: int, rate: str) -> dict[str, Value]:
    tokens, decoded = batch_size * seq_len, [batch_size / step for step in steps]
    sustained = tokens * len(times) / sum(times)
    return {
        "tokens_per_second": median("tokens_per_second", [tokens / time for time in times], unit=rate),
        **({"decode_tokens_per_second": median("decode_tokens_per_second", decoded, unit=rate)} if steps else {}),
        "sustained_tokens_per_second": value_of("sustained_tokens_per_second", sustained, n=len(times), unit=rate),
        "cold": value_of("cold", MILLISECONDS * cold, n=1),
        "batch_seconds": median("batch_seconds", times),
        **spread("batch_seconds", times),
    }


def _scaling(engine: Engine, prompts: Tensor, failed: dict[str, str]) -> dict[str, Series]:
    """Tokens a second by rows, read and decoded. A size that fails is named in `failed`, and the others are measured."""
    sizes = [1 << power for power in range((len(prompts) - 1).bit_length())] + [len(prompts)]
    read, decoded = dict[float, float](), dict[float, float]()
    for rows in sizes:
        some = prompts[:rows]

        def measure(rows: int = rows, some: Tensor = some) -> None:
            times = [step_once(engine, some) for _ in range(1 + SCALING_RUNS)][1:]
            read[float(rows)] = rows * some.shape[-1] / statistics.median(times)
            if steps := _decoding(engine, some, SCALING_RUNS):
                decoded[float(rows)] = rows / statistics.median(steps)

        if failure := attempt(measure):
            failed[str(rows)] = failure
    curves = {"batch_scaling": read, "decode_batch_scaling": decoded}
    return {
        name: Series(list(curve), list(curve.values()), "rows", unit_of_rates(engine.lm), title, "x")
        for (name, curve), title in zip(curves.items(), TITLES, strict=True)
        if curve
    }


def _knee(series: dict[str, Series]) -> dict[str, Value]:
    """The fewest rows that are nearly as good as any number of them; of reading and of decoding."""
    found = {}
    for name, metric in (("batch_scaling", "knee_rows"), ("decode_batch_scaling", "decode_knee_rows")):
        if curve := series.get(name):
            enough = ENOUGH * max(curve.y)
            knee = next(rows for rows, rate in zip(curve.x, curve.y, strict=True) if rate >= enough)
            found[metric] = value_of(metric, knee, n=len(curve.x))
    return found
