"""The most memory that a piece of work held at once, where the system tells.

    with peak_memory(lm.device) as peak:
        work()
    peak.bytes, peak.growth

On CUDA it is what torch had allocated on the device. On Linux it is what the process had in memory (VmHWM), its interpreter
and libraries included, so `growth` leaves out what was there before. Elsewhere both are None: not measured is not zero.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CLEAR_MARK = "5"  # the high-water mark becomes what is held now; see proc_pid_clear_refs(5)


@dataclass
class Peak:
    """Filled in when the block ends.

    bytes   the most that was held at once during the block; None where that cannot be measured
    growth  how much more than at its beginning
    """

    bytes: int | None = None
    growth: int | None = None


_open: list[tuple[torch.device, list[int]]] = []  # the blocks that are open, and the marks that resets have taken from them


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the block: the memory of `device`, or for the CPU that of the process. Blocks may lie in one another."""
    peak, begin = Peak(), _begin(device)
    if begin is None:
        yield peak
        return
    marks = [begin]
    _open.append((device, marks))
    try:
        yield peak
    finally:
        _open.pop()
        peak.bytes = max(*marks, _mark(device))
        peak.growth = peak.bytes - begin


def _begin(device: torch.device) -> int | None:
    """Reset the mark, for a new block, and return where it is then; None where it cannot be."""
    try:
        mark = _mark(device)
        _reset(device)
        begin = _mark(device)
    except OSError:  # no such files, or none that this process may write
        return None
    for other, marks in _open:
        if other == device:
            marks.append(mark)
    return begin


def _mark(device: torch.device) -> int:
    """The most bytes that were held at once since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if device.type == "cpu" else None
    if found is None:
        raise OSError("the most memory that was held cannot be read here.")
    return 1024 * int(found[1])


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        # What was freed before goes back to the system (glibc); else the block would take it again without being seen to.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda spare: None)(0)
        CLEAR.write_text(CLEAR_MARK)
