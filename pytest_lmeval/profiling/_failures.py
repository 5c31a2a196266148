"""Say what does not fit into memory, and go on after it.

After "out of memory" a grid of shapes goes on, since fewer rows may fit; after "device lost" nothing more can be measured on
that device in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pytest_lmeval.errors import OutOfMemory
from pytest_lmeval.models._failures import DEVICE_LOST, OUT_OF_MEMORY, bytes_wanted, failure_of

__all__ = ["DEVICE_LOST", "OUT_OF_MEMORY", "attempt", "bytes_wanted", "failure_of", "room_for"]

T = TypeVar("T")


def room_for(what: str, work: Callable[[], T]) -> T:
    """What `work()` returns. Raises OutOfMemory, naming `what`, if memory runs out; passes on any other error."""
    try:
        return work()
    except Exception as error:
        if isinstance(error, OutOfMemory) or failure_of(error) != OUT_OF_MEMORY:
            raise
        wanted = bytes_wanted(error)
    # Outside of the handler: an error that is raised in it keeps the other one, its frames, and the tensors in them.
    size = "" if wanted is None else f": an allocation of {wanted:,} bytes ({wanted / 2**30:.1f} GiB) failed"
    raise OutOfMemory(
        f"{what} does not fit into memory{size}. Nothing was measured for this shape. Take fewer rows (batch_size) or tokens "
        "(seq_len), or weights of fewer bits (@bf16).",
        wanted,
    )


def attempt(work: Callable[[], object]) -> str | None:
    """Do the work; returns why it failed, in a line, or None. So a shape that fails does not cost the results of others."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - a model may fail in any way
        kind, lines = failure_of(error), str(error).strip().splitlines()
        return f"{kind or type(error).__name__}: {lines[0] if lines else 'no message'}"
    return None
