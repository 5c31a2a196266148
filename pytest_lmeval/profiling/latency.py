"""How long a model lets one wait: prefill, time to first token, the gaps between tokens, end to end.

A run reads a prompt of `seq_len` tokens and then decodes greedily, one token a step from the carried state:

    prefill   the step over the prompt                             reading, bound by arithmetic
    ttft      prefill, and choosing the first token                what a user waits before anything appears
    itl       inter-token latency: each gap between two tokens     decoding, bound by memory bandwidth
    tpot      (e2e - ttft) / (new tokens - 1), a run               time per output token
    e2e       from the request to the last token
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from pytest_lmeval.identity import facts
from pytest_lmeval.lm import Model, state_bytes
from pytest_lmeval.profiling.timer import Runner, clock, measured, median, plain_runner, spread
from pytest_lmeval.results.metric import Metric
from pytest_lmeval.results.record import Record, Series

RUNS, WARM_UP, NEW_TOKENS = 100, 10, 8


@dataclass(frozen=True, repr=False)
class LatencyResult:
    """Latencies in milliseconds, medians over the runs. Where the clock was not run, `not_measured` says why and the
    numbers are absent."""

    record: Record

    def __repr__(self) -> str:
        return repr(self.record)

    @property
    def not_measured(self) -> str | None:
        reason: str | None = self.record.settings["not_measured"]
        return reason

    @property
    def prefill(self) -> Metric:
        return measured(self.record, "prefill")

    @property
    def ttft(self) -> Metric:
        """Time to first token."""
        return measured(self.record, "ttft")

    @property
    def itl(self) -> Metric:
        """Inter-token latency; only for models that carry a state."""
        return measured(self.record, "itl")

    @property
    def tpot(self) -> Metric:
        """Time per output token."""
        return measured(self.record, "tpot")

    @property
    def e2e(self) -> Metric:
        """End to end."""
        return measured(self.record, "e2e")

    def percentile(self, name: str, percent: int) -> Metric:
        """For example percentile("itl", 95). KeyError where the samples are too few to say."""
        return measured(self.record, f"{name}_p{percent}")


@dataclass
class Samples:
    """Times of every run, in seconds, warm-up included."""

    prefill: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    itl: list[list[float]] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)
    state_bytes: int = 0


def latency(
    lm: Model,
    *,
    batch_size: int = 1,
    seq_len: int = 128,
    new_tokens: int = NEW_TOKENS,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    seed: int = 0,
    runner: Runner = plain_runner,
) -> LatencyResult:
    """Time `runs` prompts of random tokens, after `warm_up` that are not counted (the very first one is reported as cold).

    A model without a state cannot decode from one: only its prefill is timed.
    """
    prompt, prompt_tokens = lm.random_ids(batch_size, seq_len, seed=seed), batch_size * seq_len
    new_tokens = new_tokens if lm.stateful else 1
    samples = Samples()
    not_measured = runner(lambda: generate_once(lm, prompt, new_tokens, samples), rounds=runs, warmup_rounds=warm_up)
    record = Record(
        kind="latency",
        subject=f"batch {batch_size}, {seq_len} tokens",
        lm=facts(lm),
        settings={
            "batch_size": batch_size,
            "seq_len": seq_len,
            "new_tokens": new_tokens,
            "runs": runs,
            "warm_up": warm_up,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "not_measured": not_measured,
        },
        metrics={} if not_measured else _metrics(samples, warm_up, prompt_tokens),
        cost={"seconds": sum(samples.e2e), "tokens": len(samples.e2e) * prompt_tokens, "state_bytes": samples.state_bytes},
        series={} if not_measured else _series(samples, warm_up),
    )
    return LatencyResult(record)


def generate_once(lm: Model, prompt: torch.Tensor, new_tokens: int, samples: Samples) -> None:
    """Read the prompt and decode greedily, noting when each token was there."""
    with torch.no_grad():
        began = clock(lm.device)
        logits, state = lm.step(prompt, None, keep=1)
        samples.prefill.append(clock(lm.device) - began)
        token = _next(lm, logits, prompt)
        times = [clock(lm.device)]
        samples.ttft.append(times[0] - began)
        for _ in range(new_tokens - 1):
            logits, state = lm.step(token, state, keep=1)
            token = _next(lm, logits, prompt)
            times.append(clock(lm.device))
    samples.itl.append([after - before for before, after in pairwise(times)])
    samples.e2e.append(times[-1] - began)
    samples.state_bytes = state_bytes(state)


def _next(lm: Model, logits: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """The likeliest token; of a model that reads frames, the prompt's last one: a step says nothing of the frame to come."""
    return logits[:, -1].argmax(-1, keepdim=True) if lm.codebooks is None else prompt[..., -1:]


def _metrics(samples: Samples, warm_up: int, prompt_tokens: int) -> dict[str, Metric]:
    gaps = [gap for run in samples.itl[warm_up:] for gap in run]
    timed = {"prefill": samples.prefill[warm_up:], "ttft": samples.ttft[warm_up:], "e2e": samples.e2e[warm_up:]}
    if gaps:
        timed["itl"] = gaps
        timed["tpot"] = [sum(run) / len(run) for run in samples.itl[warm_up:]]
    metrics = {}
    for name, seconds in timed.items():
        metrics[name] = median(seconds, "ms", scale=1e3)
        metrics.update(spread(name, seconds, "ms", scale=1e3))
    metrics["cold"] = Metric(1e3 * samples.e2e[0], "ms", n=1, higher_is_better=False)
    rates = [prompt_tokens / seconds for seconds in timed["prefill"]]
    metrics["prefill_tokens_per_second"] = median(rates, "tokens/s", higher_is_better=True)
    return metrics


def _series(samples: Samples, warm_up: int) -> dict[str, Series]:
    runs = samples.e2e[warm_up:]
    return {"e2e_by_run": Series(list(range(len(runs))), [1e3 * seconds for seconds in runs], "run", "ms")}
