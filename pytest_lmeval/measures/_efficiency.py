"""How well a model uses the machine: operations and bytes that a step needs, and what share of the possible speed it reaches.

Counted, and the same on every machine: the operations of reading a prompt (prefill), of decoding one token a row, and of a
pass over the prompt with all its logits, forward and backward; and the bytes that a step must at least move (see `work`).
Timed, and set against what the machine was measured to do at best (see `roofline`): the rest.

    intensity        operations / bytes                                                          FLOP/byte
    bound            min(matmul peak, intensity x bandwidth)                                      FLOP/s
    position         bandwidth-bound where intensity < matmul peak / bandwidth, else compute-bound
    share_of_bound   max(operations / matmul peak, bytes / bandwidth) / seconds: time that the roofline allows, of that taken

The bytes are a lower bound, so the model may be nearer to what the machine can do than its share says. Under 10 %, one
waits for neither products nor memory but for all the rest, the calls of many small operators above all: it is limited by
"overhead". Over 100 % where it is bandwidth-bound, weights and state lie in the caches, which are faster than the memory.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures", CACM 2009.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytest_lmeval.measures._latency import NEW_TOKENS, LatencyResult, measure_latency
from pytest_lmeval.models.identity import facts
from pytest_lmeval.models.model import Model
from pytest_lmeval.profiling.failures import room_for
from pytest_lmeval.profiling.flops import Flops
from pytest_lmeval.profiling.roofline import measured_peaks
from pytest_lmeval.profiling.runner import Runner, check_shape, quiet
from pytest_lmeval.profiling.work import Work, training_work, work_of
from pytest_lmeval.records.record import Record
from pytest_lmeval.records.value import Metric

RUNS, WARM_UP = 10, 2
OVERHEAD = 0.1  # share of the bound under which overhead is what one waits for
FORMULAS = {
    "flops_per_token": "flops / (rows x tokens): of a token, or of a frame of a model that reads frames",
    "bytes": "weights read, each once + state read + state written",
    "intensity": "flops / bytes",
    "flops_per_second": "flops / seconds",
    "share_of_peak": "flops_per_second / matmul_peak",
    "bytes_per_second": "bytes / seconds",
    "share_of_bandwidth": "bytes_per_second / bandwidth",
    "bound": "min(matmul_peak, intensity x bandwidth)",
    "share_of_bound": "max(flops / matmul_peak, bytes / bandwidth) / seconds",
    "seconds": "medians of measure_latency(): prefill, and itl for decode",
}


@dataclass(frozen=True, repr=False)
class EfficiencyResult:
    """Operations (FLOP), bytes, and shares of what the machine can do; by phase: "prefill" and "decode".

    What depends on a time raises NotMeasuredError where none was taken. A model without a state has no phase "decode"
    (KeyError).
    """

    record: Record
    latency: LatencyResult

    def __repr__(self) -> str:
        return repr(self.record)

    @property
    def not_measured(self) -> str | None:
        return self.latency.not_measured

    def flops(self, phase: str) -> Metric:
        """Operations of one step; phases also "forward" and "backward", over the prompt with all its logits."""
        return self.record.metrics[f"{phase}_flops"]

    def flops_per_token(self, phase: str) -> Metric:
        """Operations of a token, or of a frame of k codebooks of a model that reads frames; all rows are alike."""
        return self.record.metrics[f"{phase}_flops_per_token"]

    def bytes(self, phase: str) -> Metric:
        """Bytes that one step must at least move."""
        return self.record.metrics[f"{phase}_bytes"]

    def intensity(self, phase: str) -> Metric:
        """Operations for each byte."""
        return self.record.metrics[f"{phase}_intensity"]

    def share_of_bound(self, phase: str) -> Metric:
        return self._timed().metrics[f"{phase}_share_of_bound"]

    @property
    def share_of_peak(self) -> Metric:
        """What prefill reaches of the measured peak of matrix products."""
        return self._timed().metrics["prefill_share_of_peak"]

    @property
    def share_of_bandwidth(self) -> Metric:
        """What decoding reaches of the measured bandwidth."""
        return self._timed().metrics["decode_share_of_bandwidth"]

    def position(self, phase: str) -> str:
        """compute-bound, or bandwidth-bound."""
        return str(self._timed().settings["position"][phase])

    def limited_by(self, phase: str) -> str:
        """compute, bandwidth, caches or overhead; see the head of this file."""
        return str(self._timed().settings["limited_by"][phase])

    def _timed(self) -> Record:
        """The record. Raises where nothing was timed, and says why."""
        float(self.latency.prefill)
        return self.record


def measure_efficiency(
    lm: Model,
    *,
    batch_size: int = 1,
    seq_len: int = 128,
    new_tokens: int = NEW_TOKENS,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    seed: int = 0,
    threads: int | None = None,
    runner: Runner | None = None,
) -> EfficiencyResult:
    """Count and time a prompt of random tokens [b, t] and the decoding after it.

    The model is timed and the machine measured with one number of threads: the present one, or `threads`. Where the runner
    does not time, what is counted is still recorded, and nothing is measured of the machine.

    Raises ProfilingError for a shape that cannot be timed, and OutOfMemory for one that does not fit.
    """
    shape = {"batch_size": batch_size, "seq_len": seq_len, "new_tokens": new_tokens, "runs": runs, "warm_up": warm_up}
    check_shape(lm, **shape)
    what = f"{lm.spec} with batch {batch_size}, {seq_len} tokens on {lm.device}"
    with quiet(threads) as conditions:
        prompt = room_for(what, lambda: lm.random_ids(batch_size, seq_len, seed=seed))
        training, no_backward = training_work(lm, prompt)
        phases = room_for(what, lambda: work_of(lm, prompt))
        timed = room_for(what, lambda: measure_latency(lm, **shape, seed=seed, runner=runner))
        against, words = _against_machine(lm, phases, timed)
    record = Record(
        kind="efficiency",
        subject=f"batch {batch_size}, {seq_len} tokens",
        lm=facts(lm),
        settings={
            **shape,
            "seed": seed,
            **conditions,
            "formulas": FORMULAS,
            "no_backward": no_backward,
            "not_measured": timed.not_measured,
            **words,
        },
        metrics=_counted(training, phases) | against,
        cost={**timed.record.cost, "flops": phases["prefill"].flops},
    )
    return EfficiencyResult(record, timed)


def _counted(training: Flops | None, phases: dict[str, Work]) -> dict[str, Metric]:
    passes = {} if training is None else {"forward": training.forward, "backward": training.backward}
    metrics = {f"{name}_flops": _flops(count) for name, count in passes.items()}
    for phase, work in phases.items():
        metrics[f"{phase}_flops"] = _flops(work.flops)
        metrics[f"{phase}_flops_per_token"] = _flops(work.flops / work.tokens)
        metrics[f"{phase}_bytes"] = Metric(work.bytes, "bytes", n=1, higher_is_better=False)
        metrics[f"{phase}_intensity"] = Metric(work.intensity, "FLOP/byte", n=1)
    return metrics


def _against_machine(lm: Model, phases: dict[str, Work], timed: LatencyResult) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Metrics that set the times against what the machine does with as many threads, and the words for them: position, what one
    waits for, and the product that the peak is of. Nothing where there are no times."""
    if timed.not_measured:
        return {}, {}
    peaks = measured_peaks(lm.device, lm.dtype)
    metrics = {"matmul_peak": Metric(peaks.flops, "FLOP/s"), "bandwidth": Metric(peaks.bandwidth, "bytes/s")}
    position, limits = {}, {}
    for phase, work in phases.items():
        taken = timed.record.metrics.get({"prefill": "prefill", "decode": "itl"}[phase])
        position[phase] = "compute-bound" if work.intensity >= peaks.ridge else "bandwidth-bound"
        metrics[f"{phase}_bound"] = Metric(peaks.bound(work.intensity), "FLOP/s")
        if taken is None:  # one token a run: no gap between tokens was timed
            continue
        metrics[f"{phase}_flops_per_second"] = _rate(work.flops, taken, "FLOP/s")
        metrics[f"{phase}_share_of_peak"] = _rate(work.flops / peaks.flops, taken)
        metrics[f"{phase}_bytes_per_second"] = _rate(work.bytes, taken, "bytes/s")
        metrics[f"{phase}_share_of_bandwidth"] = _rate(work.bytes / peaks.bandwidth, taken)
        share = metrics[f"{phase}_share_of_bound"] = _rate(work.least_seconds(peaks), taken)
        limits[phase] = limit(share, position[phase])
    return metrics, {"position": position, "limited_by": limits, "matmul_dtype": peaks.dtype, "matmul_size": peaks.size}


def limit(share: float, position: str) -> str:
    """What one waits for, where this share of the bound is reached.

    >>> limit(0.7, "compute-bound"), limit(0.7, "bandwidth-bound"), limit(1.8, "bandwidth-bound"), limit(0.02, "compute-bound")
    ('compute', 'bandwidth', 'caches', 'overhead')
    """
    if share < OVERHEAD:
        return "overhead"
    return "caches" if share > 1 and position == "bandwidth-bound" else position.removesuffix("-bound")


def _flops(count: float) -> Metric:
    return Metric(count, "FLOP", n=1, higher_is_better=False)


def _rate(amount: float, milliseconds: Metric, unit: str = "") -> Metric:
    """`amount` a second; the slow end of the time's interval is the low end of the rate's."""
    low, high = (None if time is None else 1e3 * amount / time for time in (milliseconds.high, milliseconds.low))
    return Metric(1e3 * amount / milliseconds, unit, low=low, high=high, n=milliseconds.n, higher_is_better=True)
