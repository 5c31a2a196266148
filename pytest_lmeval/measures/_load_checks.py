"""Check what a load test is asked for, before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_lmeval.errors import ProfilingError, nearest
from pytest_lmeval.measures._load import Load
from pytest_lmeval.models._servers._client import CONCURRENCY

TIMES = ("ttft", "itl", "tpot", "e2e")


def loads_of(rate: float | Sequence[float] | None, concurrency: int | Sequence[int] | None) -> list[Load]:
    if rate is not None and concurrency is not None:
        raise ProfilingError("rate sends requests whatever is under way, and concurrency as others end: give one of both.")
    given: Any = CONCURRENCY if rate is None and concurrency is None else concurrency if rate is None else rate
    sizes = [given] if isinstance(given, int | float) else list(given)
    if not sizes or not all(isinstance(size, int | float) and 0 < size < math.inf for size in sizes):
        raise ProfilingError(f"a load is a number above 0, or several; got {given!r}.")
    if rate is None and any(size != int(size) for size in sizes):
        raise ProfilingError(f"concurrency counts requests under way; got {given!r}.")
    return [Load(size, open=rate is not None) for size in sorted(sizes)]


def check_prompts(prompts: Any) -> None:
    """Raise ProfilingError for what is no list of texts."""
    if prompts is None:
        return
    texts = [] if isinstance(prompts, str) or not isinstance(prompts, Sequence) else prompts
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ProfilingError(f"prompts is a list of texts that are not empty, or is left out; got {prompts!r:.80}.")


def objectives(slo: Any) -> Mapping[str, float]:
    if not isinstance(slo, Mapping):
        raise ProfilingError(f'slo is a dict such as {{"ttft": 500}}, in milliseconds; got {slo!r}.')
    for name, most in slo.items():
        if name not in TIMES:
            raise ProfilingError(f"slo names {name!r}.{nearest(name, TIMES)} A service level limits {', '.join(TIMES)}.")
        if not isinstance(most, int | float) or not 0 < most < math.inf:
            raise ProfilingError(f"slo allows {most!r} ms of {name}; it is a time above 0, in milliseconds.")
    return slo
