"""Certificates: the result of each law on a model, and the verdict that follows."""

from __future__ import annotations

import math
from typing import Any, Literal

from msgspec.structs import force_setattr

from pytest_lmeval.records._schema import StoredStruct

OUT_OF_TIME = "not tried: the budget was used up"
EXACT, STEP_ONLY, INEXACT = "exact-any-chunk", "exact-step-only", "inexact"
MULTIPLE = "exact-multiple-of-"  # followed by the number
NON_CAUSAL, LENGTH_DEPENDENT = "non-causal", "length-dependent"
STATELESS, CONSISTENT = "stateless", "consistent"
RANKS = (EXACT, CONSISTENT, MULTIPLE, STEP_ONLY, STATELESS, LENGTH_DEPENDENT, INEXACT, NON_CAUSAL)
"""Verdicts, best first."""


class Counterexample(StoredStruct, frozen=True):
    """The smallest case found that breaks a law.

    case      what differs from the simplest case (`laws.Case`)
    error     largest error, in nats (logits for a bit-equal law); None if not finite
    message   what happened, where, and the likely cause
    replay    a line of Python that tries the case again
    """

    case: dict[str, Any]
    error: float | None
    message: str
    replay: str


class LawResult(StoredStruct, frozen=True, kw_only=True):
    """The result of one law on one model.

    kept             no case broke it
    cases, planned   number of cases tried, and of those planned: the rest did not fit the budget
    longest          tokens of the longest case
    worst_ratio      error of the chunked run over the error of the full run, both against the reference (about 1 if all is
                     well, at most 8 is allowed); None for bit-equal laws
    worst_at         token and output of the worst ratio
    counterexamples  the smallest case with a gross error and the smallest with the least error; empty if the law is kept
    unavailable      why the law could not be tried, such as a model that reads single rows or whose state cannot be forked
    """

    cases: int
    planned: int
    kept: bool | None = None
    longest: int = 0
    worst_ratio: float | None = None
    worst_at: str | None = None
    counterexamples: tuple[Counterexample, ...] = ()
    unavailable: str | None = None

    def __post_init__(self) -> None:
        kept = not self.counterexamples
        if self.kept is None:
            force_setattr(self, "kept", kept)
        elif self.kept is not kept:
            raise ValueError(f"kept is {self.kept} with {len(self.counterexamples)} counterexamples")

    @property
    def status(self) -> Literal["kept", "broken", "not tried"]:
        return "not tried" if self.unavailable else "kept" if self.kept else "broken"

    @property
    def counterexample(self) -> str | None:
        """Message of the first counterexample."""
        return self.counterexamples[0].message if self.counterexamples else None


class State(StoredStruct, frozen=True):
    """Size and precisions of a model's state.

    bytes            after the longest sequence, of `tokens` tokens
    bytes_per_token  growth for each further token
    """

    bytes: int
    tokens: int
    bytes_per_token: float
    dtypes: tuple[str, ...]


class Certificate(StoredStruct, frozen=True, kw_only=True):
    """The verdict on a model and its evidence.

    dtype          precision that was tested
    reference      what errors were measured against
    longest        tokens of the longest sequence
    not_reached    boundaries of the model (windows, blocks) that no sequence passed
    limit          what the model does at lengths that it cannot read, if there are any
    limit_tokens   most tokens that it reads in one step, unless it declares that itself
    limit_is_step  several steps can read more
    state          size and precisions of the state
    routing_ties   tokens of mixtures of experts that were not compared because two experts were tied
    float32        of a 16-bit model, the verdict on its float32 copy, which shows faults that 16 bits hide
    chunking_used  how a record's model was streamed
    """

    verdict: str
    dtype: str
    reference: str = ""
    laws: dict[str, LawResult] = {}
    longest: int = 0
    not_reached: tuple[int, ...] = ()
    limit: str | None = None
    limit_tokens: int | None = None
    limit_is_step: bool = False
    state: State | None = None
    routing_ties: int = 0
    float32: str | None = None
    chunking_used: str | None = None

    @property
    def multiple(self) -> int | None:
        """The K of `exact-multiple-of-K`; None for any other verdict."""
        return int(self.verdict.removeprefix(MULTIPLE)) if self.verdict.startswith(MULTIPLE) else None

    @property
    def worst_ratio(self) -> float | None:
        return max((law.worst_ratio for law in self.laws.values() if law.worst_ratio is not None), default=None)

    @property
    def broken(self) -> frozenset[str]:
        return frozenset(name for name, law in self.laws.items() if not law.kept)

    @property
    def untried(self) -> list[str]:
        """Laws that the budget did not reach."""
        return [name for name, law in self.laws.items() if not law.cases and law.unavailable == OUT_OF_TIME]

    @property
    def decisive(self) -> list[str]:
        """The broken laws that decide the verdict; they may be why others are broken."""
        for first in (("repeat", "isolation"), ("causality",), ("prefix",)):
            if self.broken & set(first):
                return [law for law in first if law in self.broken]
        return [law for law in self.laws if law in self.broken]

    def why_not(self) -> str:
        """The decisive counterexamples, each with its replay line, and the names of the other broken laws."""
        lines = []
        for name in self.decisive:
            for example in self.laws[name].counterexamples:
                lines += [f"  {name}: {example.message}", f"    {example.replay}"]
        if others := [law for law in self.laws if law in self.broken and law not in self.decisive]:
            lines.append(f"  also broken, maybe for the same reason: {', '.join(others)}")
        return "\n".join(lines)


def rank(verdict: str) -> int | None:
    """Index of a verdict in `RANKS`, 0 for the best; None for a verdict that is neither good nor bad.

    >>> rank("exact-any-chunk"), rank("exact-multiple-of-4"), rank("unproven")
    (0, 2, None)
    """
    return next((index for index, name in enumerate(RANKS) if verdict.startswith(name)), None)


def finite(value: float | None) -> float | None:
    """The number, or None if it is not finite and so has no JSON."""
    return None if value is None or not math.isfinite(value) else value
