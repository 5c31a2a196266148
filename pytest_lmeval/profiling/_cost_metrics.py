"""Declare the metrics of speed, memory and work. Times are medians over runs; `x_mean`, `x_p95`, ... derive from `x`."""

from __future__ import annotations

from typing import Any

from pytest_lmeval.records._metric import Metric

ENOUGH = 0.9  # of the best rate: the knee is the fewest rows that reach it


def _time(name: str, about: str, unit: str = "ms", **options: Any) -> Metric:
    return Metric(name, unit, higher_is_better=False, aspect="speed", about=about, **options)


def _rate(name: str, about: str, unit: str = "tokens/s", **options: Any) -> Metric:
    return Metric(name, unit, aspect="speed", about=about, **options)


def _count(name: str, about: str, unit: str = "bytes", margin: str = "0%", **options: Any) -> Metric:
    return Metric(name, unit, higher_is_better=False, aspect="cost", about=about, margin=margin, **options)


def _of_a_phase(phase: str) -> tuple[Metric, ...]:
    """The metrics of one step of prefill or of decode."""
    return (
        _count(f"{phase}_flops_per_token", "flops / (rows x tokens): of a token, or of a frame", "FLOP"),
        _count(f"{phase}_flops", "operations of one step", "FLOP", headline=False),
        _count(f"{phase}_bytes", "weights read, each once + state read + state written", headline=False),
        Metric(f"{phase}_intensity", "FLOP/byte", aspect="cost", higher_is_better=None, about="flops / bytes"),
        _rate(f"{phase}_roofline_fraction", "max(flops / matmul_peak, bytes / bandwidth) / seconds", ""),
        _rate(f"{phase}_bound", "min(matmul_peak, intensity x bandwidth)", "FLOP/s", headline=False),
        _rate(f"{phase}_flops_per_second", "flops / seconds", "FLOP/s", headline=False),
        _rate(f"{phase}_peak_fraction", "flops_per_second / matmul_peak", "", headline=False),
        _rate(f"{phase}_bytes_per_second", "bytes / seconds", "bytes/s", headline=False),
        _rate(f"{phase}_bandwidth_fraction", "bytes_per_second / bandwidth", "", headline=False),
    )


DECLARED = (
    _time("ttft", "t(first token) - t(request): prefill, and choosing the token", aliases=("latency",), compared=True),
    _time("itl", "t(token i + 1) - t(token i), of all tokens of all runs", aliases=("latency",), compared=True),
    _time("itl_p95", "95 % of the gaps between tokens are shorter"),
    _time("e2e", "t(last token) - t(request)", aliases=("latency",), compared=True),
    _time(
        "cold",
        "the first run, which counts nowhere else if there is a warm-up; timed_before: whether this process timed the model",
    ),
    _time("prefill", "t(prompt read) - t(request): one step over the whole prompt", headline=False, compared=True),
    _time("tpot", "(e2e - ttft) / (new_tokens - 1), a run", headline=False),
    _time("batch_seconds", "seconds of a batch", "s", headline=False),
    _time(
        "chunk_latency",
        "t(chunk read) - t(chunk given), of all chunks but the first, which has no state to read",
        compared=True,
    ),
    _time("chunk_latency_p95", "95 % of the chunks are faster"),
    _time(
        "slowdown",
        "median latency in the last quarter of the stream / median latency in the first, its first chunk left out",
        "x",
    ),
    _time("seconds", "spent in training steps", "s"),
    _rate(
        "tokens_per_second",
        "tokens (or frames) read / seconds; of repeated readings the median",
        aliases=("throughput",),
        compared=True,
    ),
    _rate("prefill_tokens_per_second", "batch_size x seq_len / prefill", aliases=("throughput",)),
    _rate("decode_tokens_per_second", "tokens decoded by all rows / seconds, median over the steps", compared=True),
    _rate("sustained_tokens_per_second", "tokens of all batches / seconds of all batches", headline=False),
    _rate("knee_rows", f"the fewest rows that reach {ENOUGH:.0%} of the best rate of any batch", "rows"),
    _rate("decode_knee_rows", f"the fewest rows that reach {ENOUGH:.0%} of the best rate of decoding", "rows"),
    _rate("requests_per_second", "requests answered / seconds of the load", "requests/s"),
    _rate("output_tokens_per_second", "tokens generated for all requests / seconds of the load", compared=True),
    _rate("goodput", "requests answered within the service level / seconds of the load", "requests/s"),
    _rate("load_knee", f"the smallest load that reaches {ENOUGH:.0%} of the best output rate of any", "requests"),
    _time("failed_requests", "requests that failed / requests sent", ""),
    _time("client_busy", "processor time of the client / seconds of the load", "", headline=False),
    *(_time(f"{name}_ratio", f"{name} of this server / of the other, in turns", "") for name in ("ttft", "itl", "tpot", "e2e")),
    _rate("output_tokens_per_second_ratio", "output rate of this server / of the other, in turns", ""),
    _rate("matmul_peak", "measured peak of matrix products in the model's dtype", "FLOP/s", headline=False),
    _rate("bandwidth", "measured peak of bytes moved", "bytes/s", headline=False),
    _count("weights_bytes", "storages of parameters and buffers, each once; quantized weights as they are packed"),
    _count("state_bytes", "bytes of memory that the carried state holds"),
    _count("activations_bytes", "most that a run allocated at once, less the state after the prompt", margin="1%"),
    _count(
        "peak_bytes",
        "CPU: most that the process had in memory; CUDA: most that torch had allocated",
        margin="1%",
        repeats=False,
    ),
    _count("growth_bytes", "peak, less what was held before the run", repeats=False, headline=False),
    _count("tensors_peak_bytes", "most that torch's allocations of the run held at once", margin="1%", headline=False),
    _count("allocated_bytes", "held by torch on the device before the run", repeats=False, headline=False),
    _count("reserved_bytes", "most that torch's allocator reserved on the device", repeats=False, headline=False),
    _count("model_bytes", "of parameters and buffers as stored in memory"),
    _count("peak_memory", "most that the process (or device) had in use while training", repeats=False, headline=False),
    _count("peak_memory_growth", "the same, less what was held before", repeats=False),
    _count("parameters", "of the model", ""),
    _count("flops", "operations of the measurement", "FLOP"),
    _count("flops_forward", "operations of all forward passes of the training", "FLOP", headline=False),
    _count("flops_backward", "operations of all backward passes of the training", "FLOP", headline=False),
    _count("flops_total", "operations of the training", "FLOP"),
    _count("forward_flops", "operations of one forward pass over the prompt with all its logits", "FLOP", headline=False),
    _count("backward_flops", "operations of one backward pass over the prompt with all its logits", "FLOP", headline=False),
    *_of_a_phase("prefill"),
    *_of_a_phase("decode"),
)
METRICS = {metric.name: metric for metric in DECLARED}
