"""What this machine can do at best: operations and bytes a second, measured, so that a speed means something on another one.

The roofline (Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures",
CACM 2009): work of I operations for each byte that it must move runs at no more than

    min(peak, I x bandwidth)   operations a second

It is bound by bandwidth where I is less than peak / bandwidth (the ridge), and by compute beyond.

peak       best product of square matrices of several sizes, in the precision that the model computes in: 2 n^3 operations
bandwidth  best of reading a tensor much larger than the caches (a sum: its bytes) and of copying it (its bytes read and
           written: twice its bytes, as STREAM counts; a write that also reads the line first is not counted for it)

Each is the best of the repetitions within a time budget: what disturbs a measurement only ever makes it slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pytest_lmeval.profiling._clock import seconds

SECONDS = 0.25  # for each size of matrix, and for each way of moving bytes
SIZES = {"cpu": (256, 512, 1024, 2048), "accelerator": (1024, 2048, 4096, 8192)}
BYTES = {"cpu": 1 << 28, "accelerator": 1 << 30}  # of the tensor that is read: many times a cache
FEWEST = 2


@dataclass(frozen=True)
class Peaks:
    """What a device can do at best with so many threads.

    flops      operations a second, in products of matrices of `dtype`
    bandwidth  bytes a second
    size       side of the matrices that were fastest
    """

    flops: float
    bandwidth: float
    device: str
    dtype: str
    threads: int
    size: int

    @property
    def ridge(self) -> float:
        """Operations for each byte, from which on compute is the bound."""
        return self.flops / self.bandwidth

    def bound(self, intensity: float) -> float:
        """Operations a second at most, at so many operations for each byte.

        >>> Peaks(flops=100.0, bandwidth=10.0, device="cpu", dtype="float32", threads=1, size=256).bound(2.0)
        20.0
        """
        return min(self.flops, intensity * self.bandwidth)


def measured_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The peaks for the present number of threads; measured once in a process, in about two seconds."""
    return _measured(str(device), dtype, torch.get_num_threads())


@functools.cache
def _measured(device: str, dtype: torch.dtype, threads: int) -> Peaks:
    place = torch.device(device)
    kind = "cpu" if place.type == "cpu" else "accelerator"
    flops, size = _matmul_peak(SIZES[kind], place, dtype)
    return Peaks(flops, _bandwidth(BYTES[kind], place), device, str(dtype).removeprefix("torch."), threads, size)


def _matmul_peak(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Operations a second, and the size that they were reached with."""
    rates = {}
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        result = torch.empty_like(left)
        fastest = _fastest(functools.partial(torch.mm, left, right, out=result), device, SECONDS)
        rates[size] = 2 * size**3 / fastest
        if fastest > SECONDS:  # the next size would take eight times as long
            break
    best = max(rates, key=lambda size: rates[size])
    return rates[best], best


def _bandwidth(size: int, device: torch.device) -> float:
    """In float32, whatever the model computes in: a byte is a byte, and sums of short numbers are slow for other reasons."""
    source = torch.ones(size // 4, device=device)
    read = size / _fastest(source.sum, device, SECONDS)
    target = torch.empty_like(source)
    return max(read, 2 * size / _fastest(lambda: target.copy_(source), device, SECONDS))


def _fastest(work: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Seconds of the fastest call of as many as fit into `budget` seconds (FEWEST at least), after one that is not counted."""
    work()
    times: list[float] = []
    with torch.no_grad():
        while len(times) < FEWEST or sum(times) < budget:
            began = seconds(device)
            work()
            times.append(seconds(device) - began)
    return min(times)
