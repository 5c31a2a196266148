"""Time the runs of a verb under fixed conditions, and make the record of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median_high
from typing import Any

import torch

from pytest_lmeval.engine import Engine
from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.models._flops import count_flops
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._weak_cache import WeakCache
from pytest_lmeval.profiling._clock import Stopwatch, tick
from pytest_lmeval.profiling._roofline import Peaks, measured_peaks
from pytest_lmeval.profiling._samples import MILLISECONDS, runs_to_see, stability
from pytest_lmeval.records._measured import Cost, Record, Result, Series
from pytest_lmeval.records._metric import STATISTICS, metric, value_of
from pytest_lmeval.records._value import Value

Run = Callable[[], Any]
Steps = Callable[[Stopwatch], Any]
TICKS = 100  # a time of so many ticks of the clock is known to one percent
TIMED = WeakCache[bool]()  # the loaded models that this process has timed, by `step_fn`
WHOLE_RUNS = ("prefill", "tpot", "e2e", "stream", "batch")  # samples that have one time for each run


def bare_loop(run: Run, rounds: int) -> None:
    for _ in range(rounds):
        run()


@dataclass(frozen=True)
class Runner:
    """The way a verb takes times.

    repeat        (run, rounds) -> None: call `run` so many times; the record has its `name`
    not_measured  why times would mean nothing here; then operations are counted and nothing is timed
    clock         seconds, on the CPU; a GPU stamps events
    tick          seconds between two times that the clock can tell apart; measured if None
    """

    repeat: Callable[[Run, int], None] = bare_loop
    not_measured: str | None = None
    name: str = "bare loop"
    clock: Callable[[], float] = time.perf_counter
    tick: float | None = None
    peaks: Callable[[torch.device, torch.dtype], Peaks] = measured_peaks


@dataclass(frozen=True, repr=False)
class Timed(Result):
    """The result of a verb that takes times. Where nothing was timed, `not_measured` says why and the numbers are absent.

    samples  the times of the runs that count, in seconds
    """

    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def not_measured(self) -> str | None:
        return self.record.not_measured


@contextmanager
def quiet(threads: int | None = None) -> Iterator[int]:
    """Run the block without gradients, without the garbage collector, and with a fixed number of threads, which it yields.

    Raises ProfilingError if the model changes that number: its times would mix two conditions.
    """
    if threads is not None and threads < 1:
        raise ProfilingError(f"threads is {threads}; it is at least 1, or None for torch's own number.")
    before, collecting = torch.get_num_threads(), gc.isenabled()
    pinned = before if threads is None else threads
    torch.set_num_threads(pinned)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            yield pinned
        if (left := torch.get_num_threads()) != pinned:
            raise ProfilingError(
                f"the model changed the number of threads from {pinned} to {left} while it was timed, so its times cannot be "
                f"compared with one another. Set the number before: torch.set_num_threads({left}), or threads={left}."
            )
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


@contextmanager
def timed_runs(lm: Model, runner: Runner | None, threads: int | None) -> Iterator[TimedRuns]:
    """The runs of a verb, timed in the block under the conditions of `quiet`."""
    runs = TimedRuns(lm, runner or Runner())
    with quiet(threads) as runs.threads:
        yield runs


class TimedRuns:
    """The times of one verb's runs, the operations of one run, and their record.

    `Steps` is one run: a function that marks the end of each of its steps on the stopwatch that it is given.

    warm_up, runs  seconds of the steps of each run; those of the warm-up do not count
    flops          operations of one run; None where it failed
    samples        seconds by name, as `keep` found them; empty where nothing was timed
    """

    def __init__(self, lm: Model, runner: Runner) -> None:
        self.lm, self.runner, self.threads = lm, runner, 0
        self.engine, self.facts = Engine(lm), facts(lm)  # facts: cannot be read any more from a lost device
        self.warm_up, self.runs = list[list[float]](), list[list[float]]()
        self.flops: int | None = None
        self.samples, self.too_short = dict[str, list[float]](), dict[str, str]()
        self.not_measured: str | None = None

    def laps(self, steps: Steps) -> list[float]:
        watch = Stopwatch(self.lm.device, self.runner.clock)
        steps(watch)
        return watch.laps()

    def time(self, steps: Steps, runs: int | Callable[[float], int], warm_up: int) -> None:
        """Time `runs` (or as many as it returns for the seconds of the fastest run of the warm-up), unless the runner takes no
        times."""
        if self.runner.not_measured is None:
            self.warm_up += [self.laps(steps) for _ in range(warm_up)]
            rounds = runs if isinstance(runs, int) else runs(min(map(sum, self.warm_up)))
            self.runner.repeat(lambda: self.runs.append(self.laps(steps)), rounds)

    def count(self, steps: Steps) -> None:
        """Count the operations of a further run, since counting takes time."""
        self.flops = count_flops(lambda: self.laps(steps))

    def keep(self, samples: dict[str, list[float]], needs: str, failure: str | None = None) -> bool:
        """Keep the samples that are long enough for the clock, or none if `needs` is not or the model failed; returns whether
        there are any."""
        resolution = self.runner.tick or tick(self.lm.device.type)
        for name, times in samples.items():
            if times and (typical := median_high(times)) < TICKS * resolution:
                self.too_short[name] = (
                    f"{name} takes {1e6 * typical:.3g} us and the clock ticks every {1e6 * resolution:.3g} us, so it is not "
                    "known to one percent. Take a larger batch_size or seq_len."
                )
        self.not_measured = failure or self.runner.not_measured or self.too_short.get(needs)
        if self.not_measured is None:
            self.samples = {name: times for name, times in samples.items() if times and name not in self.too_short}
        return bool(self.samples)

    def cold(self) -> dict[str, Value]:
        """The time of the first run of all, as a metric."""
        return {"cold": value_of("cold", MILLISECONDS * sum((self.warm_up + self.runs)[0]), n=1)}

    def unit_of_rates(self) -> str:
        """tokens/s; frames/s for a model that reads frames of several codebooks."""
        return "tokens/s" if self.lm.codebooks is None else "frames/s"

    def record(
        self,
        kind: str,
        subject: str,
        settings: dict[str, Any],
        metrics: dict[str, Value],
        *,
        tokens: int,
        series: dict[str, Series],
        state_bytes: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> Record:
        """The record of these runs. `tokens` are those of one run, in all rows."""
        device = self.lm.device.type
        clock = "perf_counter" if device == "cpu" else f"{device} events, one synchronization a run"
        details = {**(details or {}), "too_short": self.too_short, "clock": clock}
        if self.samples:
            by_run = {name: self.samples[name] for name in WHOLE_RUNS if name in self.samples}
            details |= {"timed_by": self.runner.name, "timed_before": self.lm.step_fn in TIMED}
            TIMED.value(self.lm.step_fn, lambda: True)
            details["stability"] = stability([*by_run.values()][-1])
            details["runs_to_see_5_percent"] = {name: runs_to_see(times) for name, times in by_run.items()}
        about = {name: metric(name).about for name in metrics if not name.endswith(STATISTICS)}
        details["formulas"] = {name: text for name, text in about.items() if text}
        count = max(1, len(self.runs))
        return Record(
            kind=kind,
            subject=subject,
            lm=self.facts,
            settings={**settings, "threads": self.threads},
            details=details,
            notes=_notes(details),
            not_measured=self.not_measured,
            metrics=metrics,
            cost=Cost(
                seconds=sum(map(sum, self.runs)),
                tokens=tokens * count,
                flops=None if self.flops is None else self.flops * count,
                state_bytes=state_bytes,
            ),
            series=series,
        )


def _notes(details: dict[str, Any]) -> list[str]:
    """Notes for a reader of the times: that the machine was not steady, and what has no number."""
    grade = details.get("stability")
    notes = [f"the machine was {grade}"] if grade not in (None, "steady") else []
    listed = {"failed": details.get("failed"), "too short for the clock": details["too_short"]}
    return notes + [f"{what}: {', '.join(names)}" for what, names in listed.items() if names]


def check_shape(lm: Model, *, batch_size: int, seq_len: int, new_tokens: int = 1, runs: int = 1, warm_up: int = 0) -> None:
    """Raise ProfilingError for a shape that cannot be timed, before anything is."""
    check_counts(batch_size=batch_size, seq_len=seq_len, new_tokens=new_tokens, runs=runs)
    check_counts(least=0, warm_up=warm_up)
    if lm.limit is not None and seq_len + new_tokens - 1 > lm.limit:
        raise ProfilingError(
            f"{lm.spec} reads at most {lm.limit:,} tokens, fewer than a prompt of {seq_len:,} and the {new_tokens - 1:,} that "
            "follow it. Take a shorter seq_len."
        )


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raise ProfilingError for what is no whole number, or less than `least`."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            why = f", so there is nothing to measure. It is at least {least}" if least else "; it is 0 or more"
            raise ProfilingError(f"{name} is {count!r}{why}.")
