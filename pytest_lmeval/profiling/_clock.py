"""Reading the time of work on a device, where a call may return before its work is done.

device_clock()        the clock that pytest-benchmark is given: it waits for the device, then looks
seconds(device)       the same, outside pytest
Stopwatch(device)     the moments within one run, a token each; on a GPU the device stamps them itself, as events, so that
                      nothing waits before the run is over: waiting at every token would slow what is measured
"""

from __future__ import annotations

import functools
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def device_clock() -> float:
    """Seconds, after everything that was sent to the present device is done. Loads nothing: no torch, no device."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(device: torch.device) -> float:
    """Seconds, after everything that was sent to `device` is done."""
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """The moments of one run on a device, from when it has nothing else to do.

    watch = Stopwatch(device)
    logits, state = lm.step(...); watch.mark()
    watch.laps()                                    seconds between the marks, the first from the beginning
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, list[Any]()
        seconds(device)
        self.mark()

    def mark(self) -> None:
        """Note the moment when everything that was sent to the device until now is done."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            import torch

            event = torch.Event(self._device, enable_timing=True)
            event.record(torch.accelerator.current_stream(self._device))  # which is not the present one on another GPU
            self._marks.append(event)

    def laps(self) -> list[float]:
        """Seconds from mark to mark. Waits for the device, once."""
        seconds(self._device)
        if self._device.type == "cpu":
            return [after - before for before, after in pairwise(self._marks)]
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]


def kind_of_clock(device: torch.device) -> str:
    """How the moments of a run are taken, for the record."""
    return "perf_counter" if device.type == "cpu" else f"{device.type} events, one synchronization a run"


@functools.cache
def tick(device_type: str = "cpu") -> float:
    """Seconds between two times that the clock can tell apart: of events half a microsecond, as CUDA documents it."""
    if device_type != "cpu":
        return 0.5e-6
    found = []
    for _ in range(20):
        began = now = time.perf_counter()
        while now == began:
            now = time.perf_counter()
        found.append(now - began)
    return min(found)
