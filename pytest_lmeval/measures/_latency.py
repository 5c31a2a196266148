"""How long a model lets one wait: prefill, time to first token, the gaps between tokens, end to end.

A run reads a prompt of `seq_len` tokens and then decodes greedily, one token a step from the carried state. What is taken
between which moments, `profiling._cost_metrics` declares; other tools use the same names for other things, so the formulas
stand in every record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pytest_lmeval.engine import Engine
from pytest_lmeval.engine._engine import likeliest
from pytest_lmeval.measures._context import verb_of
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
from pytest_lmeval.profiling._samples import MILLISECONDS, median, quantiles, spread
from pytest_lmeval.records._measured import Cost, Record, Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value

RUNS, WARM_UP, NEW_TOKENS = 100, 10, 8
BY_RUN = ("prefill", "tpot", "e2e")


@dataclass(frozen=True, repr=False)
class LatencyResult(Timed):
    """Latencies in milliseconds, medians over the runs."""

    @property
    def prefill(self) -> Value:
        """Reading the prompt; bound by arithmetic."""
        return measured(self.record, "prefill")

    @property
    def ttft(self) -> Value:
        """Time to first token: what one waits before anything appears."""
        return measured(self.record, "ttft")

    @property
    def itl(self) -> Value:
        """Inter-token latency, bound by the bandwidth of memory; only for models that carry a state."""
        return measured(self.record, "itl")

    @property
    def tpot(self) -> Value:
        """Time per output token."""
        return measured(self.record, "tpot")

    @property
    def e2e(self) -> Value:
        """End to end."""
        return measured(self.record, "e2e")

    @property
    def stability(self) -> str | None:
        """How far the machine let the times be: steady, fluctuating or disturbed (see `profiling._samples.stability`)."""
        found: str | None = self.record.details.get("stability")
        return found

    def percentile(self, name: str, percent: int) -> Value:
        """For example percentile("itl", 95). KeyError where the samples are too few to say."""
        return measured(self.record, f"{name}_p{percent}")


def measure_latency(
    lm: Model,
    batch_size: int = 1,
    seq_len: int = 128,
    *,
    new_tokens: int = NEW_TOKENS,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    seed: int = 0,
    threads: int | None = None,
    runner: Runner | None = None,
) -> LatencyResult:
    """Prefill, time to first token, inter-token latency: `runs` prompts of random tokens, after `warm_up` that do not count.

    In a test that asks for the fixture `benchmark`, pytest-benchmark drives the runs and keeps their times. Where nothing
    was timed (under xdist, or with --benchmark-disable), the record says so, and a test that looks at a time is skipped.

    A model without a state cannot decode from one: only its prefill is timed. The present number of threads is held, or
    `threads`. Raises ProfilingError where a shape cannot be timed.
    """
    check_shape(lm, batch_size=batch_size, seq_len=seq_len, new_tokens=new_tokens, runs=runs, warm_up=warm_up)
    runner = runner or Runner()
    prompt, new_tokens = lm.random_ids(batch_size, seq_len, seed=seed), new_tokens if lm.stateful else 1
    engine, about, states, times = Engine(lm), facts(lm), list[Any](), list[list[float]]()
    with quiet(threads) as conditions:
        if runner.not_measured is None:
            for _ in range(warm_up):
                times.append(generate_once(engine, prompt, new_tokens))
            runner.repeat(lambda: times.append(generate_once(engine, prompt, new_tokens)), runs)
        flops = count_flops(lambda: generate_once(engine, prompt, new_tokens, states))  # a run of its own: counting takes time
    timed = times[warm_up:]
    taken = _samples(timed) if timed else {}
    short = {name: why for name, times in taken.items() if (why := too_short(times, lm.device, name))}
    samples = {name: times for name, times in taken.items() if name not in short}
    not_measured = runner.not_measured or (None if "e2e" in samples else short["e2e"])
    values = {} if not_measured else _values(samples, sum(times[0]), batch_size, seq_len, unit_of_rates(lm))
    by_run = {name: samples[name] for name in BY_RUN if name in samples}
    details = {"too_short": short, **about_times(lm, runner, by_run, values)}
    record = Record(
        kind="latency",
        subject=f"batch {batch_size}, {seq_len} tokens",
        lm=about,
        settings={
            "batch_size": batch_size,
            "seq_len": seq_len,
            "new_tokens": new_tokens,
            "runs": runs,
            "warm_up": warm_up,
            "seed": seed,
            **conditions,
        },
        details=details,
        notes=notes_of(details),
        not_measured=not_measured,
        metrics=values,
        cost=Cost(
            seconds=sum(map(sum, timed)),
            tokens=len(timed) * batch_size * (seq_len + new_tokens - 1),
            flops=flops * max(1, len(timed)),
            state_bytes=state_bytes(states[0]),
        ),
        series={} if not_measured else _series(samples),
    )
    return LatencyResult(record, {} if not_measured else samples)


latency = verb_of("latency", measure_latency)


def generate_once(engine: Engine, prompt: torch.Tensor, new_tokens: int, states: list[Any] | None = None) -> list[float]:
    """Read the prompt and decode greedily. Returns the seconds of the step over the prompt, of choosing the first token, and
    of each token after it. The last state is left in `states`."""
    watch = Stopwatch(engine.lm.device)
    logits, state = engine.prefill(prompt)
    watch.mark()
    token = likeliest(logits, prompt)
    watch.mark()
    decoding = engine.decode(token, state, new_tokens - 1)
    for _, state in decoding:  # noqa: B007 - the last one is what is left
        watch.mark()
    if states is not None:
        states.append(state)
    return watch.laps()


def _samples(timed: list[list[float]]) -> dict[str, list[float]]:
    """Seconds, by what was waited for; gaps of all runs together."""
    found = {
        "prefill": [run[0] for run in timed],
        "ttft": [run[0] + run[1] for run in timed],
        "e2e": [sum(run) for run in timed],
    }
    if len(timed[0]) > 2:
        found["itl"] = [gap for run in timed for gap in run[2:]]
        found["tpot"] = [sum(run[2:]) / len(run[2:]) for run in timed]
    return found


def _values(samples: dict[str, list[float]], cold: float, batch_size: int, seq_len: int, rate: str) -> dict[str, Value]:
    rates = {
        "prefill_tokens_per_second": [batch_size * seq_len / time for time in samples.get("prefill", ())],
        "decode_tokens_per_second": [batch_size / time for time in samples.get("tpot", ())],
    }
    return {
        **{name: median(name, times) for name, times in samples.items()},
        "cold": value_of("cold", MILLISECONDS * cold, n=1),
        **{name: median(name, values, unit=rate) for name, values in rates.items() if values},
        **{name: value for of, times in samples.items() for name, value in spread(of, times).items()},
    }


def _series(samples: dict[str, list[float]]) -> dict[str, Series]:
    runs = [MILLISECONDS * time for time in samples["e2e"]]
    title = "Time of a whole request, run by run"
    series = {"e2e_by_run": Series([float(run) for run in range(len(runs))], runs, "run", "ms", title)}
    shown = {"prefill": "Time of prefill, by quantile", "itl": "Time between tokens (ITL), by quantile"}
    curves = {f"{name}_quantiles": quantiles(name, samples[name], said) for name, said in shown.items() if name in samples}
    return series | curves
