"""Read the time of work on a device, where a call may return before its work is done."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def device_clock() -> float:
    """Seconds, after the current device has finished its work; the clock for pytest-benchmark. Does not import torch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(device: torch.device) -> float:
    """Seconds, after `device` has finished its work."""
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Time the steps of one run, from when the device is idle.

    A GPU stamps the marks itself, as events, since synchronizing at every token would slow down what is timed; on the CPU they
    are seconds of `clock`.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock, self._marks = device, clock, list[Any]()
        seconds(device)
        self.mark()

    def mark(self) -> None:
        """Note when the device finishes the work that it has been given so far."""
        if self._device.type == "cpu":
            self._marks.append(self._clock())
        else:
            import torch

            event = torch.Event(self._device, enable_timing=True)
            event.record(torch.accelerator.current_stream(self._device))  # the current stream may be one of another GPU
            self._marks.append(event)

    def laps(self) -> list[float]:
        """Seconds from mark to mark, the first from the beginning. Waits for the device, once."""
        seconds(self._device)
        if self._device.type == "cpu":
            return [after - before for before, after in pairwise(self._marks)]
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]


@functools.cache
def tick(device_type: str = "cpu") -> float:
    """Seconds between two times that the clock can tell apart: half a microsecond for events, as CUDA documents."""
    if device_type != "cpu":
        return 0.5e-6
    found = []
    for _ in range(20):
        began = now = time.perf_counter()
        while now == began:
            now = time.perf_counter()
        found.append(now - began)
    return min(found)
