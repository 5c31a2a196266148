"""Measure how well a model uses the machine: operations and bytes of a step, and the fraction of the possible speed it reaches.

Operations and bytes are counted, and equal on every machine (see `profiling._work`); the other numbers set measured times
against what the machine can do at best (see `profiling._roofline`). The bytes are a lower bound, so the model may be nearer to
what the machine can do than its fraction says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec import structs

from pytest_lmeval.measures._context import verb_of
from pytest_lmeval.measures._latency import NEW_TOKENS, LatencyResult, measure_latency
from pytest_lmeval.models._flops import Flops
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model
from pytest_lmeval.profiling._failures import room_for
from pytest_lmeval.profiling._roofline import Peaks
from pytest_lmeval.profiling._runner import Runner, check_shape, quiet
from pytest_lmeval.profiling._work import Work, training_work, work_of
from pytest_lmeval.records._measured import MetricValue, Record, Result, measured
from pytest_lmeval.records._metric import metric, value_of
from pytest_lmeval.records._value import Value

RUNS, WARM_UP = 10, 2
OVERHEAD = 0.1  # roofline fraction below which overhead is the limit
TIME_OF = {"prefill": "prefill", "decode": "itl"}  # phase -> its latency


@dataclass(frozen=True, repr=False)
class EfficiencyResult(Result):
    """Operations (FLOP), bytes, and fractions of what the machine can do; by phase: "prefill" and "decode".

    A number that depends on a time raises NotMeasuredError where none was taken. A model without a state has no phase "decode"
    (KeyError).
    """

    latency: LatencyResult

    peak_fraction = MetricValue("prefill_peak_fraction")
    """What prefill reaches of the measured peak of matrix products."""
    bandwidth_fraction = MetricValue("decode_bandwidth_fraction")
    """What decoding reaches of the measured bandwidth."""

    @property
    def not_measured(self) -> str | None:
        return self.latency.not_measured

    def flops(self, phase: str) -> Value:
        """Operations of one step; phases also "forward" and "backward", over the prompt with all its logits."""
        return self.record.metrics[f"{phase}_flops"]

    def flops_per_token(self, phase: str) -> Value:
        """Operations of a token, or of a frame of k codebooks of a model that reads frames; all rows are alike."""
        return self.record.metrics[f"{phase}_flops_per_token"]

    def bytes(self, phase: str) -> Value:
        """Bytes that one step must at least move."""
        return self.record.metrics[f"{phase}_bytes"]

    def intensity(self, phase: str) -> Value:
        """Operations for each byte."""
        return self.record.metrics[f"{phase}_intensity"]

    def roofline_fraction(self, phase: str) -> Value:
        """The least possible time over the time taken: max(operations / matmul peak, bytes / bandwidth) / seconds."""
        return measured(self.record, f"{phase}_roofline_fraction")

    def bound_by(self, phase: str) -> str:
        """bandwidth-bound where the intensity is below matmul peak / bandwidth, else compute-bound."""
        return self._finding("bound_by", phase)

    def limited_by(self, phase: str) -> str:
        """compute or bandwidth; "overhead" below a fraction of 10 %, mostly the calls of many small operators; "caches" above
        100 % where it is bandwidth-bound: weights and state lie in them, which are faster than the memory."""
        return self._finding("limited_by", phase)

    def _finding(self, name: str, phase: str) -> str:
        measured(self.record, f"{phase}_bound")  # raises where nothing was timed
        return str(self.record.details[name][phase])


def measure_efficiency(
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
) -> EfficiencyResult:
    """Operations and bytes of a step, and how near to this machine's roofline it runs, over a prompt of random tokens [b, t]
    and the decoding after it, as `latency` has them.

    The model is timed and the machine measured with the same number of threads: the current one, or `threads`. Where nothing is
    timed, the counts are still recorded, and the machine is not measured.

    Raises ProfilingError for a shape that cannot be timed, and OutOfMemory for one that does not fit.
    """
    shape = {"batch_size": batch_size, "seq_len": seq_len, "new_tokens": new_tokens, "runs": runs, "warm_up": warm_up}
    check_shape(lm, **shape)
    runner, what = runner or Runner(), f"{lm.spec} with batch {batch_size}, {seq_len} tokens on {lm.device}"
    with quiet(threads) as pinned:
        prompt = room_for(what, lambda: lm.random_ids(batch_size, seq_len, seed=seed))
        training, no_backward = training_work(lm, prompt)
        phases = room_for(what, lambda: work_of(lm, prompt))
        latency = room_for(what, lambda: measure_latency(lm, **shape, seed=seed, runner=runner))
        peaks = None if latency.not_measured else runner.peaks(lm.device, lm.dtype)
    too_short = {phase: why for phase in phases if (why := latency.record.details["too_short"].get(TIME_OF[phase]))}
    values, details = _counted(training, phases), {"no_backward": no_backward, "too_short": too_short}
    if peaks is not None:
        fractions, findings = _against_machine(peaks, phases, latency)
        values, details = values | fractions, details | findings
    record = Record(
        kind="efficiency",
        subject=f"batch {batch_size}, {seq_len} tokens",
        lm=facts(lm),
        settings={**shape, "seed": seed, "threads": pinned},
        details={**details, "formulas": {name: metric(name).about for name in values}},
        notes=latency.record.notes,
        not_measured=latency.not_measured,
        metrics=values,
        cost=structs.replace(latency.record.cost, flops=phases["prefill"].flops),
    )
    return EfficiencyResult(record, latency)


efficiency = verb_of("efficiency", measure_efficiency)


def _counted(training: Flops | None, phases: dict[str, Work]) -> dict[str, Value]:
    passes = {} if training is None else {"forward": training.forward, "backward": training.backward}
    metrics = {f"{name}_flops": value_of(f"{name}_flops", count, n=1) for name, count in passes.items()}
    for phase, work in phases.items():
        counts = {"flops": work.flops, "flops_per_token": work.flops / work.tokens, "bytes": work.bytes}
        for name, count in {**counts, "intensity": work.intensity}.items():
            metrics[f"{phase}_{name}"] = value_of(f"{phase}_{name}", count, n=1)
    return metrics


def _against_machine(peaks: Peaks, phases: dict[str, Work], latency: LatencyResult) -> tuple[dict[str, Value], dict[str, Any]]:
    """Metrics that set the times against the machine's peaks, and details: bound and limit by phase, the matrix product."""
    machine = {"matmul_peak": peaks.flops, "bandwidth": peaks.bandwidth}
    metrics = {name: value_of(name, number) for name, number in machine.items()}
    bound_by, limits = {}, {}
    for phase, work in phases.items():
        bound_by[phase] = "compute-bound" if work.intensity >= peaks.ridge else "bandwidth-bound"
        metrics[f"{phase}_bound"] = value_of(f"{phase}_bound", peaks.bound(work.intensity))
        milliseconds = latency.record.metrics.get(TIME_OF[phase])
        if milliseconds is None:  # too short for the clock; or one token a run, so that no gap between tokens was timed
            continue
        amounts = {
            "flops_per_second": work.flops,
            "peak_fraction": work.flops / peaks.flops,
            "bytes_per_second": work.bytes,
            "bandwidth_fraction": work.bytes / peaks.bandwidth,
            "roofline_fraction": work.least_seconds(peaks),
        }
        metrics |= {f"{phase}_{name}": _rate(f"{phase}_{name}", amount, milliseconds) for name, amount in amounts.items()}
        limits[phase] = limit(metrics[f"{phase}_roofline_fraction"], bound_by[phase])
    return metrics, {"bound_by": bound_by, "limited_by": limits, "matmul_dtype": peaks.dtype, "matmul_size": peaks.size}


def limit(roofline_fraction: float, bound_by: str) -> str:
    """What limits a phase that reaches this fraction.

    >>> limit(0.7, "compute-bound"), limit(0.7, "bandwidth-bound"), limit(1.8, "bandwidth-bound"), limit(0.02, "compute-bound")
    ('compute', 'bandwidth', 'caches', 'overhead')
    """
    if roofline_fraction < OVERHEAD:
        return "overhead"
    return "caches" if roofline_fraction > 1 and bound_by == "bandwidth-bound" else bound_by.removesuffix("-bound")


def _rate(name: str, amount: float, milliseconds: Value) -> Value:
    """`amount` a second; the upper end of the time's interval is the lower end of the rate's."""
    time = milliseconds.interval
    interval = time and (1e3 * amount / time[1], 1e3 * amount / time[0])
    return value_of(name, 1e3 * amount / milliseconds, interval, n=milliseconds.n)
