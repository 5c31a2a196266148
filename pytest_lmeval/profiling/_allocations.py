"""The most bytes that torch's own allocations held at once: exact, and the same from run to run with as many threads.

    with watched_allocations() as seen:
        work()
    seen.peak

On the CPU every tensor, and every piece of memory that an operator asks torch for, is an event of `torch.profiler` with its
address and size. What was allocated before the block is no part of it, not even when it is freed in it.

Not seen: memory that does not come from torch's allocator, which is what oneDNN takes to reorder and to work in, other
libraries (numpy, a BLAS), Python's own objects; and what threads that the block started ask for by themselves.
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
from typing import Any

from torch.profiler import ProfilerActivity, profile

CPU = 0  # c10::DeviceType


@dataclass
class Allocations:
    """Filled in when the block ends.

    peak       bytes, the most that was held at once of what the block allocated
    addresses  where it was
    """

    peak: int = 0
    addresses: set[int] = field(default_factory=set)


@contextmanager
def watched_allocations() -> Iterator[Allocations]:
    """Watch the block's allocations on the CPU.

    Cycles of objects are not collected meanwhile: when that would happen depends on what the process did before, and the peak
    would with it. Raises RuntimeError inside of another profile of torch: there is one at a time.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would write two lines to stderr at every start
    seen = Allocations()
    with without_collecting(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield seen
    _replay(_events(profiled), seen)


@contextmanager
def without_collecting() -> Iterator[None]:
    """Everything that is garbage now is collected, and nothing more in the block."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _events(profiled: profile) -> list[dict[str, Any]]:
    """The memory events of a profile in their order, as its trace has them."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    found = [event["args"] for event in events if event.get("name") == "[memory]"]
    return sorted(found, key=lambda event: int(event["Ev Idx"]))


def _replay(events: list[dict[str, Any]], seen: Allocations) -> None:
    held: dict[int, int] = {}
    now = 0
    for event in events:
        address, size = int(event["Addr"]), int(event["Bytes"])
        if int(event["Device Type"]) != CPU:
            continue
        if size > 0:
            held[address] = size
            now += size
            seen.addresses.add(address)
            seen.peak = max(seen.peak, now)
        else:
            now -= held.pop(address, 0)
