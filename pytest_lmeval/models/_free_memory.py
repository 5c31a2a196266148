"""Tell how much memory is free."""

from __future__ import annotations

import re
from pathlib import Path

import torch

MEMINFO, STATUS, CGROUP = Path("/proc/meminfo"), Path("/proc/self/status"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that may still be allocated: on the device, or of the CPU's memory within the limits of this process and its
    cgroup; None if the system does not tell."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type != "cpu":
        return None
    found = [free for free in (_available(), _within_cgroup(), _within_limit()) if free is not None]
    return max(0, min(found)) if found else None


def _available() -> int | None:
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
    return None if found is None else 1024 * int(found[1])


def _within_cgroup() -> int | None:
    """What the limit of the cgroup leaves. Pages of files that nobody has used lately count as free: they are given back."""
    try:
        most, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return most - used + (int(cached[1]) if cached else 0)


def _within_limit() -> int | None:
    """What `ulimit -v` leaves of the address space."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = re.search(r"VmSize:\s+(\d+) kB", STATUS.read_text())
    except (ImportError, OSError):
        return None
    return None if limit == resource.RLIM_INFINITY or used is None else limit - 1024 * int(used[1])
