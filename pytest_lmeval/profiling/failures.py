"""Why a model failed at one shape, in a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def failure_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def attempt(work: Callable[[], Any]) -> str | None:
    """Do the work. Returns why it failed, or None: what fails at one shape does not cost what is measured at others."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - a model may fail in any way
        return failure_of(error)
    return None
