"""Shorten the traceback of a test's error, and release what its frames keep in memory."""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from types import TracebackType

GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def up_to_the_test(error: BaseException, path: str) -> TracebackType | None:
    """The last entry of an error's traceback in the file `path`, without the calls below it; None if there is none."""
    found, entry = None, error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code.co_filename == path:
            found = entry
        entry = entry.tb_next
    return found and TracebackType(None, found.tb_frame, found.tb_lasti, found.tb_lineno)


def release_frames(error: BaseException) -> None:
    """Clear the local variables of every frame of an error and of its causes.

    pytest keeps the error of a failed test (`sys.last_exc`), whose frames would keep that test's model in memory while the next
    test loads its own. Before Python 3.13 `traceback.clear_frames` leaves `f_locals`, a copy of the variables, and closes
    generators: a fixture that waits at its `yield` would never be torn down, so frames of generators stay as they are.
    """
    errors, seen = [error], set()
    while errors:
        error = errors.pop()
        if id(error) in seen:
            continue
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if sys.version_info >= (3, 13) or not frame.f_code.co_flags & GENERATORS:
                with contextlib.suppress(RuntimeError):  # it is still running
                    frame.clear()
                    frame.f_locals  # noqa: B018 - reading it updates the copy: empty
        linked = (error.__cause__, error.__context__, *getattr(error, "exceptions", ()))
        errors += [other for other in linked if isinstance(other, BaseException)]
