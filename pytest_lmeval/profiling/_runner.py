"""Who calls what is timed, under which conditions, and what is refused before."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pytest_lmeval.errors import NotMeasuredError, ProfilingError
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._weak_cache import WeakCache
from pytest_lmeval.profiling._clock import kind_of_clock, tick
from pytest_lmeval.profiling._samples import runs_to_see, stability
from pytest_lmeval.records._measured import Record, Result
from pytest_lmeval.records._metric import STATISTICS, metric
from pytest_lmeval.records._value import Value

Run = Callable[[], Any]
TICKS = 100  # a time of so many ticks of the clock is known to one percent
TIMED = WeakCache[bool]()  # the loaded models that were timed in this process, by `step_fn`


def bare_loop(run: Run, rounds: int) -> None:
    """Call `run` so many times."""
    for _ in range(rounds):
        run()


@dataclass(frozen=True)
class Runner:
    """Who calls the timed function: a bare loop, or pytest-benchmark.

    repeat        (run, rounds) calls `run` so many times
    name          who that is, for the record
    not_measured  why times would say nothing here, so that none are taken: the function is called once
    """

    repeat: Callable[[Run, int], None] = bare_loop
    not_measured: str | None = None
    name: str = "bare loop"


@dataclass(frozen=True, repr=False)
class Timed(Result):
    """What a verb returns that takes times. Where nothing was timed, `not_measured` says why and the numbers are absent.

    samples  the times themselves, in seconds, of the runs that count
    """

    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def not_measured(self) -> str | None:
        return self.record.not_measured


def measured(record: Record, name: str) -> Value:
    """The metric of that name. Raises NotMeasuredError where the clock was not run, ProfilingError where the model failed,
    KeyError if there is no such metric."""
    if failure := record.details.get("failure"):
        raise ProfilingError(f"{record.lm.spec} failed at {record.subject}, so there is no {name}: {failure}")
    if reason := record.not_measured or record.details.get("too_short", {}).get(name.partition("_")[0]):
        raise NotMeasuredError(f"{name} was not measured: {reason}")
    return record.metrics[name]


@contextmanager
def quiet(threads: int | None = None) -> Iterator[dict[str, int]]:
    """While times are taken: no gradients, no garbage collector, and the same number of threads from beginning to end.

    Yields what a record says of it, filled in at the end. Raises ProfilingError if the number changed on the way: some times
    were taken with one, some with another.
    """
    if threads is not None and threads < 1:
        raise ProfilingError(f"threads is {threads}; it is at least 1, or None for those that torch has.")
    before, collecting = torch.get_num_threads(), gc.isenabled()
    pinned = before if threads is None else threads
    conditions = {"threads": pinned}
    torch.set_num_threads(pinned)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            yield conditions
        if (left := torch.get_num_threads()) != pinned:
            raise ProfilingError(
                f"the model set the number of threads from {pinned} to {left} while it was timed, so its times are not of one "
                f"kind. Set it before: torch.set_num_threads({left}), or threads={left}."
            )
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def about_times(lm: Model, runner: Runner, by_run: dict[str, list[float]], values: dict[str, Value]) -> dict[str, Any]:
    """What the details of a record say of its times: the clock, who called, whether this model had been timed before, how
    steady the machine was, by the last of these times of runs, how many runs would show a difference of 5 %, and what each of
    the values is."""
    about: dict[str, Any] = {"clock": kind_of_clock(lm.device)}
    if values:
        about |= {"timed_by": runner.name, "timed_before": lm.step_fn in TIMED}
        TIMED.value(lm.step_fn, lambda: True)
        about["stability"] = stability([*by_run.values()][-1])
        about["runs_to_see_5_percent"] = {name: runs_to_see(times) for name, times in by_run.items()}
    return {**about, "formulas": {name: said for name in values if (said := metric(name).about) and not _is_statistic(name)}}


def _is_statistic(name: str) -> bool:
    return name.endswith(STATISTICS)


def notes_of(details: dict[str, Any]) -> list[str]:
    """What a reader is to know of times: that they vary more than on a quiet machine, and what could not be timed."""
    grade, failed = details.get("stability"), details.get("failed")
    unsteady = [f"the machine was {grade}"] if grade not in (None, "steady") else []
    return unsteady + ([f"failed: {', '.join(failed)}"] if failed else [])


def unit_of_rates(lm: Model) -> str:
    """What a model reads and writes so many of in a second: tokens, or frames of all its codebooks."""
    return "tokens/s" if lm.codebooks is None else "frames/s"


def too_short(samples: Sequence[float], device: torch.device, what: str) -> str | None:
    """Why the clock is too coarse for these times, in seconds; None if it is not."""
    typical, step = sorted(samples)[len(samples) // 2], tick(device.type)
    if typical >= TICKS * step:
        return None
    return (
        f"{what} takes {1e6 * typical:.3g} us and the clock ticks every {1e6 * step:.3g} us, so that is not known to one "
        "percent. Give it more to do: a larger batch_size or seq_len."
    )


def check_shape(lm: Model, *, batch_size: int, seq_len: int, new_tokens: int = 1, runs: int = 1, warm_up: int = 0) -> None:
    """Refuse what cannot be timed, before anything is. Raises ProfilingError."""
    given = {"batch_size": batch_size, "seq_len": seq_len, "new_tokens": new_tokens, "runs": runs}
    for name, value in given.items():
        if value < 1:
            raise ProfilingError(f"{name} is {value}: then there is nothing to measure. It is at least 1.")
    if warm_up < 0:
        raise ProfilingError(f"warm_up is {warm_up}; it is 0 or more.")
    length = seq_len + new_tokens - 1
    if lm.limit is not None and length > lm.limit:
        raise ProfilingError(
            f"{lm.spec} reads at most {lm.limit:,} tokens; {seq_len:,} of a prompt and {new_tokens - 1:,} that follow "
            "are more. Ask for a shorter seq_len."
        )
