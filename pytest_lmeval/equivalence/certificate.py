"""What the probe found: law by law, and the verdict that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

EXACT, STEP_ONLY, INEXACT = "exact-any-chunk", "exact-step-only", "inexact"
MULTIPLE = "exact-multiple-of-"  # and the number
NON_CAUSAL, LENGTH_DEPENDENT = "non-causal", "length-dependent"
STATELESS, CONSISTENT = "stateless", "consistent"
LOW_PRECISION = ("float16", "bfloat16")


@dataclass(frozen=True)
class LawResult:
    """One law on one model.

    cases           how many sequences it was tried on, of how many that were planned: the rest did not fit the budget
    worst_ratio     error of the chunked run over the error of the full run, both against the reference (about 1 where
                    all is well, allowed 8); None for laws that are bit-equal
    counterexample  the smallest case that breaks it, in words; None where it is kept
    unavailable     why the law could not be tried at all: a model of single rows, or whose state cannot be forked
    """

    law: str
    cases: int
    planned: int
    worst_ratio: float | None = None
    counterexample: str | None = None
    unavailable: str | None = None

    @property
    def kept(self) -> bool:
        return self.counterexample is None

    def to_json(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "cases": self.cases,
            "planned": self.planned,
            "worst_ratio": _finite(self.worst_ratio),
            "counterexample": self.counterexample,
            "unavailable": self.unavailable,
        }


@dataclass(frozen=True)
class Certificate:
    """The verdict on a model and what it rests on; `chunking_used` is filled in by whoever streams with it."""

    verdict: str
    dtype: str
    reference: str
    laws: dict[str, LawResult] = field(default_factory=dict)
    chunking_used: str | None = None

    @property
    def worst_ratio(self) -> float | None:
        return max((law.worst_ratio for law in self.laws.values() if law.worst_ratio is not None), default=None)

    def why_not(self) -> str:
        """The counterexamples of the broken laws."""
        return "\n".join(f"  {law.law}: {law.counterexample}" for law in self.laws.values() if not law.kept)

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "dtype": self.dtype,
            "reference": self.reference,
            "worst_ratio": _finite(self.worst_ratio),
            "laws": {name: law.to_json() for name, law in self.laws.items()},
            "chunking_used": self.chunking_used,
        }


def _finite(ratio: float | None) -> float | None:
    return None if ratio is None or not math.isfinite(ratio) else ratio


def multiple_of(verdict: str) -> int | None:
    """The K of `exact-multiple-of-K`; None for any other verdict."""
    return int(verdict.removeprefix(MULTIPLE)) if verdict.startswith(MULTIPLE) else None


def verdict_of(laws: dict[str, LawResult], *, stateful: bool, dtype: str, multiple: int | None = None) -> str:
    """The verdict that the kept and broken laws add up to; `multiple` is the chunk length found exact where not all are.

    16-bit arithmetic is too coarse to tell a small fault from rounding, so there a model that breaks nothing is
    `consistent`: not refuted, not proven. Where something is left over from one sequence to the next, the other laws
    may look broken for that reason alone, so isolation is asked first.
    """
    broken = {name for name, law in laws.items() if not law.kept}
    if "isolation" in broken:
        return INEXACT
    if "causality" in broken:
        return NON_CAUSAL
    if "prefix" in broken:
        return LENGTH_DEPENDENT
    if broken & {"rows", "fork"}:
        return INEXACT
    if not stateful:
        return STATELESS
    if "splits" in broken:
        return f"{MULTIPLE}{multiple}" if multiple else INEXACT if "steps" in broken else STEP_ONLY
    if "steps" in broken:
        return INEXACT
    return CONSISTENT if dtype in LOW_PRECISION else EXACT
