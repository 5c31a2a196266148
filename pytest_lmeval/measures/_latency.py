"""Measure latencies: prefill, time to first token, the gaps between tokens, end to end.

Other tools use the same names for other things, so every record holds the formulas (from `profiling._cost_metrics`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pytest_lmeval.engine import Engine
from pytest_lmeval.engine._engine import likeliest
from pytest_lmeval.measures._context import verb_of
from pytest_lmeval.models._model import Model, State, state_bytes
from pytest_lmeval.profiling._clock import Stopwatch
from pytest_lmeval.profiling._runner import Runner, Timed, check_shape, timed_runs
from pytest_lmeval.profiling._samples import MILLISECONDS, median, quantiles, spread
from pytest_lmeval.records._measured import MetricValue, Series, measured
from pytest_lmeval.records._value import Value

RUNS, WARM_UP, NEW_TOKENS = 100, 10, 8


@dataclass(frozen=True, repr=False)
class LatencyResult(Timed):
    """Latencies in milliseconds, medians over the runs."""

    prefill = MetricValue()
    """Reading the prompt; bound by arithmetic."""
    ttft = MetricValue()
    """Time to first token."""
    itl = MetricValue()
    """Inter-token latency, bound by memory bandwidth; only for models that carry a state."""
    tpot = MetricValue()
    """Time per output token."""
    e2e = MetricValue()
    """End to end."""

    @property
    def stability(self) -> str | None:
        """How steady the machine was: steady, fluctuating or disturbed (see `profiling._samples.stability`)."""
        found: str | None = self.record.details.get("stability")
        return found

    def percentile(self, name: str, percent: int) -> Value:
        """For example percentile("itl", 95). KeyError if there are too few samples."""
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

    A run reads a prompt of `seq_len` tokens and then decodes greedily, one token a step from the carried state. In a test that
    uses the fixture `benchmark`, pytest-benchmark drives the runs and keeps their times. Where nothing is timed (under xdist,
    or with --benchmark-disable), the record says so, and a test that reads a time is skipped.

    Of a model without a state only the prefill is timed. The number of threads stays what it is, or `threads`. Raises
    ProfilingError for a shape that cannot be timed.
    """
    shape = {"batch_size": batch_size, "seq_len": seq_len, "new_tokens": new_tokens, "runs": runs, "warm_up": warm_up}
    check_shape(lm, **shape)
    shape["new_tokens"] = new_tokens = new_tokens if lm.stateful else 1
    prompt, states = lm.random_ids(batch_size, seq_len, seed=seed), list[State]()
    with timed_runs(lm, runner, threads) as timed:
        timed.time(lambda watch: generate_once(timed.engine, prompt, new_tokens, watch), runs, warm_up)
        timed.count(lambda watch: states.append(generate_once(timed.engine, prompt, new_tokens, watch)))
    seconds = {
        "prefill": [run[0] for run in timed.runs],
        "ttft": [run[0] + run[1] for run in timed.runs],
        "e2e": [sum(run) for run in timed.runs],
        "itl": [gap for run in timed.runs for gap in run[2:]],
        "tpot": [sum(run[2:]) / len(run[2:]) for run in timed.runs if run[2:]],
    }
    there_are_times = timed.keep(seconds, needs="e2e")
    samples = timed.samples
    values = _values(samples, batch_size, seq_len, timed.unit_of_rates()) | timed.cold() if there_are_times else {}
    record = timed.record(
        "latency",
        f"batch {batch_size}, {seq_len} tokens",
        {**shape, "seed": seed},
        values,
        tokens=batch_size * (seq_len + new_tokens - 1),
        series=_series(samples) if there_are_times else {},
        state_bytes=state_bytes(states[0]),
    )
    return LatencyResult(record, samples)


latency = verb_of("latency", measure_latency)


def generate_once(engine: Engine, prompt: torch.Tensor, new_tokens: int, watch: Stopwatch) -> Any:
    """Read the prompt and decode greedily; returns the last state. Marks the step over the prompt and each chosen token."""
    logits, state = engine.prefill(prompt)
    watch.mark()
    token = likeliest(logits, prompt)
    watch.mark()
    for _, state in engine.decode(token, state, new_tokens - 1):  # noqa: B007, B020 - the last one is returned
        watch.mark()
    return state


def _values(samples: dict[str, list[float]], batch_size: int, seq_len: int, rate: str) -> dict[str, Value]:
    rates = {
        "prefill_tokens_per_second": [batch_size * seq_len / time for time in samples.get("prefill", ())],
        "decode_tokens_per_second": [batch_size / time for time in samples.get("tpot", ())],
    }
    return {
        **{name: median(name, times, runs=len(samples["e2e"])) for name, times in samples.items()},
        **{name: median(name, values, unit=rate) for name, values in rates.items() if values},
        **{name: value for of, times in samples.items() for name, value in spread(of, times).items()},
    }


def _series(samples: dict[str, list[float]]) -> dict[str, Series]:
    runs = [MILLISECONDS * time for time in samples["e2e"]]
    title = "Time of a whole request, run by run"
    series = {"e2e_by_run": Series([float(run) for run in range(len(runs))], runs, "run", "ms", title)}
    titles = {"prefill": "Time of prefill, by quantile", "itl": "Time between tokens (ITL), by quantile"}
    curves = {f"{name}_quantiles": quantiles(name, samples[name], text) for name, text in titles.items() if name in samples}
    return series | curves
