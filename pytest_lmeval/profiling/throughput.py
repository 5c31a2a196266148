"""How much a model reads in a second when it is kept busy: batches of prompts, one after the other.

The batch is then doubled from one row up, to see where more rows stop helping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pytest_lmeval.identity import facts
from pytest_lmeval.lm import Model
from pytest_lmeval.profiling.timer import Runner, clock, measured, median, plain_runner, spread
from pytest_lmeval.results.metric import Metric
from pytest_lmeval.results.record import Record, Series

RUNS, WARM_UP = 10, 2


@dataclass(frozen=True, repr=False)
class ThroughputResult:
    """Tokens read a second, median over the runs. Where the clock was not run, `not_measured` says why."""

    record: Record

    def __repr__(self) -> str:
        return repr(self.record)

    @property
    def not_measured(self) -> str | None:
        reason: str | None = self.record.settings["not_measured"]
        return reason

    @property
    def tokens_per_second(self) -> Metric:
        return measured(self.record, "tokens_per_second")

    @property
    def batch_scaling(self) -> Series:
        """Tokens a second by rows in the batch."""
        return self.record.series["batch_scaling"]


def throughput(
    lm: Model,
    *,
    batch_size: int = 32,
    seq_len: int = 512,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    scaling: bool = True,
    seed: int = 0,
    runner: Runner = plain_runner,
) -> ThroughputResult:
    """Time `runs` steps over a batch of random prompts; with `scaling`, also one step of each smaller power of two."""
    prompts, tokens = lm.random_ids(batch_size, seq_len, seed=seed), batch_size * seq_len
    seconds: list[float] = []
    not_measured = runner(lambda: seconds.append(step_once(lm, prompts)), rounds=runs, warmup_rounds=warm_up)
    rates = [tokens / taken for taken in seconds[warm_up:]]
    series = {"batch_scaling": _scaling(lm, prompts)} if scaling and not not_measured else {}
    record = Record(
        kind="throughput",
        subject=f"batch {batch_size}, {seq_len} tokens",
        lm=facts(lm),
        settings={
            "batch_size": batch_size,
            "seq_len": seq_len,
            "runs": runs,
            "warm_up": warm_up,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "not_measured": not_measured,
        },
        metrics=_metrics(rates, seconds[warm_up:]) if not not_measured else {},
        cost={"seconds": sum(seconds), "tokens": len(seconds) * tokens},
        series=series,
    )
    return ThroughputResult(record)


def step_once(lm: Model, prompts: torch.Tensor) -> float:
    with torch.no_grad():
        began = clock(lm.device)
        lm.step(prompts, None, keep=1)
        return clock(lm.device) - began


def _metrics(rates: list[float], seconds: list[float]) -> dict[str, Metric]:
    metrics = {"tokens_per_second": median(rates, "tokens/s", higher_is_better=True)}
    metrics["batch_seconds"] = median(seconds, "s")
    return metrics | spread("batch_seconds", seconds, "s")


def _scaling(lm: Model, prompts: torch.Tensor) -> Series:
    sizes = [1 << power for power in range(len(prompts).bit_length()) if 1 << power <= len(prompts)]
    best = [max(rows * prompts.shape[-1] / step_once(lm, prompts[:rows]) for _ in range(2)) for rows in sizes]
    return Series([float(size) for size in sizes], best, "rows", "tokens/s")
