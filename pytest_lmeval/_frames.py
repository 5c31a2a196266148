"""The frames of a test's error: which of them is the test's own, and what they all keep in memory."""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from types import TracebackType

GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def up_to_the_test(error: BaseException, path: str) -> TracebackType | None:
    """The traceback of an error from the last line of the file `path` that it came through, without what that line called."""
    found, entry = None, error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code.co_filename == path:
            found = entry
        entry = entry.tb_next
    return found and TracebackType(None, found.tb_frame, found.tb_lasti, found.tb_lineno)


def release_frames(error: BaseException) -> None:
    """Clear the local variables of every frame that an error came through, and those of its causes.

    pytest keeps the error of a failed test (`sys.last_exc`), and its frames would keep the model of that test in memory while
    the next one loads its own. `traceback.clear_frames` is not enough before Python 3.13: there a frame has a second copy of
    its variables once they were asked for (pytest asks), and to clear the frame of a generator closes it, so that a fixture
    that waits behind its `yield` would never be torn down. Those frames are left.
    """
    errors, seen = [error], set()
    while errors:
        error = errors.pop()
        if id(error) in seen:
            continue
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if sys.version_info >= (3, 13) or not frame.f_code.co_flags & GENERATORS:
                with contextlib.suppress(RuntimeError):  # it still runs, or waits
                    frame.clear()
                    frame.f_locals  # noqa: B018 - to ask again brings the copy up to date: empty
        linked = (error.__cause__, error.__context__, *getattr(error, "exceptions", ()))
        errors += [other for other in linked if isinstance(other, BaseException)]
