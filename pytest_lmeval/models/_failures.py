"""Recognize errors of torch that concern the machine and not the model: memory that runs out, and a device that is lost. Do
work again after the first, with nothing of it kept."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from pytest_lmeval.errors import OutOfMemory

OUT_OF_MEMORY, DEVICE_LOST = "out of memory", "device lost"
NO_MEMORY = re.compile(
    r"out of memory"  # CUDA, ROCm, MPS
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|(CUBLAS|CUDNN|HIPBLAS)_STATUS_ALLOC_FAILED"
    r"|Storage size calculation overflowed"  # more than can be addressed
)
NO_DEVICE = re.compile(r"(CUDA|HIP|cuDNN|CUBLAS) error|device-side assert|No (CUDA|HIP) GPUs are available")
NO_ROOM = (OutOfMemory, MemoryError, torch.OutOfMemoryError)
LOST: type[BaseException] | tuple[()] = getattr(torch, "AcceleratorError", ())  # torch 2.8 and later
WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
T = TypeVar("T")
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def failure_of(error: BaseException) -> str | None:
    """OUT_OF_MEMORY, DEVICE_LOST, or None for another error. An error that was raised `from` one of them counts as that one.

    >>> failure_of(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    'out of memory'
    >>> failure_of(ValueError("out of memory"))  # not raised by torch
    """
    causes = list(_causes(error))
    said = [str(cause) for cause in causes if isinstance(cause, RuntimeError)]
    if any(isinstance(cause, NO_ROOM) for cause in causes) or any(map(NO_MEMORY.search, said)):
        return OUT_OF_MEMORY
    lost = any(isinstance(cause, LOST) for cause in causes) or any(map(NO_DEVICE.search, said))
    return DEVICE_LOST if lost else None


def bytes_wanted(error: BaseException) -> int | None:
    """The size of the allocation that failed, if the error has it, as in "Tried to allocate 1.50 GiB"."""
    for cause in _causes(error):
        if isinstance(cause, OutOfMemory):
            return cause.wanted
        if found := WANTED.search(str(cause)):
            return round(float(found[1]) * UNITS[found[2]])
    return None


@dataclass(frozen=True)
class NoMemory:
    """Work that did not fit into memory. `wanted`: the size of the allocation that failed, None if unknown."""

    wanted: int | None


def unless_full(work: Callable[[], T]) -> T | NoMemory:
    """What `work()` returns, or `NoMemory`. Then the frames of the error and their tensors are gone, and caches are empty."""
    try:
        return work()
    except Exception as error:
        if failure_of(error) != OUT_OF_MEMORY:
            raise
        wanted = bytes_wanted(error)
    # Outside of the handler: an error that is being handled keeps its frames, and the tensors in them.
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used
    return NoMemory(wanted)


def halving(work: Callable[[int], T], most: int, least: int = 1) -> tuple[T | NoMemory, int]:
    """`work(most)`, done again with half as much whenever it does not fit into memory, and how much that was; `NoMemory` if it
    would be less than `least`."""
    while True:
        found = unless_full(partial(work, most))
        if most // 2 < least or not isinstance(found, NoMemory):
            return found, most
        most //= 2


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
