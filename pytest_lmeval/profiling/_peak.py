"""Measure the most memory that a block of code held at once, where the system can tell.

CUDA: what torch had allocated on the device. Linux: what the process had in memory (VmHWM), interpreter and libraries
included, so `growth` leaves out what was there before. Elsewhere both are None.
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
CLEAR_MARK = "5"  # sets the high-water mark to what is held now; see proc_pid_clear_refs(5)


@dataclass
class Peak:
    """The most bytes that a block held at once, and how many more than at its beginning; filled in when it ends."""

    bytes: int | None = None
    growth: int | None = None


_open: list[tuple[torch.device, list[int]]] = []  # the open blocks, and the high-water marks before each reset in them


@contextmanager
def peak_memory(device: torch.device, clear: Path = CLEAR) -> Iterator[Peak]:
    """Measure the block: the memory of `device`, or for the CPU that of the process, whose high-water mark is reset by writing
    to the file `clear`. Blocks may be nested."""
    peak = Peak()
    try:
        mark = _mark(device)
        _reset(device, clear)
        begin = _mark(device)
    except OSError:  # no such file, or this process may not write to it
        yield peak
        return
    for other, marks in _open:
        if other == device:
            marks.append(mark)
    marks = [begin]
    _open.append((device, marks))
    try:
        yield peak
    finally:
        _open.pop()
        peak.bytes = max(*marks, _mark(device))
        peak.growth = peak.bytes - begin


def _mark(device: torch.device) -> int:
    """The most bytes that were held at once since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if device.type == "cpu" else None
    if found is None:
        raise OSError("the high-water mark of the memory cannot be read here.")
    return 1024 * int(found[1])


def _reset(device: torch.device, clear: Path) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        # Give freed memory back to the system (glibc), else the block could reuse it without raising the mark.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda spare: None)(0)
        clear.write_text(CLEAR_MARK)
