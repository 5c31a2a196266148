"""Measure the peak of torch's own allocations on the CPU: exact, and equal from run to run with the same number of threads.

`torch.profiler` reports each allocation (tensors, and workspace that an operator asks torch for) with its address and size. It
does not see memory that bypasses torch's allocator (oneDNN's buffers, numpy, a BLAS, Python's objects), nor what threads that
the block started allocate.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

CPU = 0  # c10::DeviceType


@dataclass
class Allocations:
    """The largest number of bytes that a block's allocations held at once, and their addresses; filled in when it ends."""

    peak: int = 0
    addresses: set[int] = field(default_factory=set)


@contextmanager
def watched_allocations() -> Iterator[Allocations]:
    """Watch the block's allocations on the CPU. Memory that was allocated before does not count, even if the block frees it.

    The garbage collector is off in the block: when it runs depends on what the process did before, and the peak would too.
    Raises RuntimeError inside of another profile of torch.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes two lines to stderr at every start
    seen, collecting = Allocations(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            yield seen
    finally:
        if collecting:
            gc.enable()
    _replay(profiled, seen)


def _replay(profiled: profile, seen: Allocations) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    found = [event["args"] for event in events if event.get("name") == "[memory]" and int(event["args"]["Device Type"]) == CPU]
    held, now = dict[int, int](), 0
    for event in sorted(found, key=lambda event: int(event["Ev Idx"])):
        address, size = int(event["Addr"]), int(event["Bytes"])
        if size > 0:
            held[address] = size
            now += size
            seen.addresses.add(address)
            seen.peak = max(seen.peak, now)
        else:
            now -= held.pop(address, 0)
