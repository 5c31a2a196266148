"""The verdict that the broken laws of a model add up to."""

from __future__ import annotations

from pytest_lmeval.records._certificate import (
    CONSISTENT,
    EXACT,
    INEXACT,
    LENGTH_DEPENDENT,
    MULTIPLE,
    NON_CAUSAL,
    STATELESS,
    STEP_ONLY,
)

LOW_PRECISION = ("float16", "bfloat16")


def verdict_of(broken: frozenset[str], *, stateful: bool, dtype: str, multiple: int | None = None) -> str:
    """The verdict that the broken laws add up to; `multiple` is the chunk length found exact where not all are.

    16-bit arithmetic is too coarse to tell a small fault from rounding, so there a model that breaks nothing is
    `consistent`: not refuted, not proven. Where the same call gives two results, or something is left over from one
    sequence to the next, the other laws may look broken for that reason alone, so those are asked first.
    """
    if broken & {"repeat", "isolation"}:
        return INEXACT
    if "causality" in broken:
        return NON_CAUSAL
    if "prefix" in broken:
        return LENGTH_DEPENDENT
    if broken - {"splits", "steps"}:
        return INEXACT
    if not stateful:
        return STATELESS
    if "splits" in broken:
        return f"{MULTIPLE}{multiple}" if multiple else INEXACT if "steps" in broken else STEP_ONLY
    if "steps" in broken:
        return INEXACT
    return CONSISTENT if dtype in LOW_PRECISION else EXACT
