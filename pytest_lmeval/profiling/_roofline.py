"""Measure what this machine can do at best: the roofline, min(peak, operations for each byte x bandwidth), in FLOP/s.

peak       best product of square matrices of several sizes, in the precision that the model computes in: 2 n^3 operations
bandwidth  best of reading a tensor much larger than the caches (a sum: its bytes) and of copying it (its bytes read and
           written: twice its bytes, as STREAM counts; a write may also read the line first, which is not counted)

Each is the best of several repetitions: a disturbance only ever makes a measurement slower. Source: Williams, Waterman,
Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures", CACM 2009.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pytest_lmeval.profiling._clock import seconds

SECONDS = 0.25  # for each size of matrix, and for each way of moving bytes
FEWEST = 2


@dataclass(frozen=True)
class Load:
    """The work that measures the peaks: square matrices of these sizes, and a tensor of so many bytes; `seconds` for each."""

    sizes: tuple[int, ...]
    nbytes: int
    seconds: float = SECONDS


ON_CPU = Load((256, 512, 1024, 2048), 1 << 28)  # bytes: many times a cache
ON_ACCELERATOR = Load((1024, 2048, 4096, 8192), 1 << 30)


@dataclass(frozen=True)
class Peaks:
    """The operations (in products of matrices of `dtype`) and bytes a second that a device reaches with so many threads.

    size  side of the matrices that were fastest
    """

    flops: float
    bandwidth: float
    device: str
    dtype: str
    threads: int
    size: int

    @property
    def ridge(self) -> float:
        """Operations for each byte: compute is the bound from here on, bandwidth below."""
        return self.flops / self.bandwidth

    def bound(self, intensity: float) -> float:
        """Operations a second at most, at `intensity` operations for each byte."""
        return min(self.flops, intensity * self.bandwidth)


def measured_peaks(device: torch.device, dtype: torch.dtype, load: Load | None = None) -> Peaks:
    """The peaks for the current number of threads; measured once in a process, in about two seconds."""
    load = load or (ON_CPU if device.type == "cpu" else ON_ACCELERATOR)
    return _measured(str(device), dtype, torch.get_num_threads(), load)


@functools.cache
def _measured(device: str, dtype: torch.dtype, threads: int, load: Load) -> Peaks:
    flops, size = _matmul_peak(load, torch.device(device), dtype)
    return Peaks(flops, _bandwidth(load, torch.device(device)), device, str(dtype).removeprefix("torch."), threads, size)


def _matmul_peak(load: Load, device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Operations a second, and the size of matrix that reaches them."""
    rates = {}
    for size in load.sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        result = torch.empty_like(left)
        time = fastest(functools.partial(torch.mm, left, right, out=result), device, load.seconds)
        rates[2 * size**3 / time] = size
        if time > SECONDS:  # the next size would take eight times as long
            break
    best = max(rates)
    return best, rates[best]


def _bandwidth(load: Load, device: torch.device) -> float:
    """In float32, whatever the model computes in: sums of shorter numbers are slow for reasons other than bandwidth."""
    source = torch.ones(load.nbytes // 4, device=device)
    target = torch.empty_like(source)
    read = load.nbytes / fastest(source.sum, device, load.seconds)
    return max(read, 2 * load.nbytes / fastest(lambda: target.copy_(source), device, load.seconds))


def fastest(
    work: Callable[[], Any], device: torch.device, budget: float, clock: Callable[[torch.device], float] = seconds
) -> float:
    """Seconds of the fastest of the calls that fit into `budget` seconds (at least FEWEST), after one that does not count."""
    work()
    times: list[float] = []
    with torch.no_grad():
        while len(times) < FEWEST or sum(times) < budget:
            began = clock(device)
            work()
            times.append(clock(device) - began)
    return min(times)
