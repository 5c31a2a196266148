"""What the probe of a model's laws found: law by law, and the verdict that follows."""

from __future__ import annotations

import math
from typing import Any

from msgspec.structs import force_setattr

from pytest_lmeval.records._schema import Kept

OUT_OF_TIME = "not tried: the budget was used up"
EXACT, STEP_ONLY, INEXACT = "exact-any-chunk", "exact-step-only", "inexact"
MULTIPLE = "exact-multiple-of-"  # and the number
NON_CAUSAL, LENGTH_DEPENDENT = "non-causal", "length-dependent"
STATELESS, CONSISTENT = "stateless", "consistent"
RANKS = (EXACT, CONSISTENT, MULTIPLE, STEP_ONLY, STATELESS, LENGTH_DEPENDENT, INEXACT, NON_CAUSAL)
"""Verdicts on a model's laws, the best first."""


class Counterexample(Kept, frozen=True):
    """The smallest case found that breaks a law.

    case      what differs from the simplest case (`laws.Case`)
    error     the largest error, in nats (logits, for a law that is bit-equal); None where it is no number
    message   what happened, where, and what is likely the matter
    replay    a line of Python that tries it again
    """

    case: dict[str, Any]
    error: float | None
    message: str
    replay: str


class LawResult(Kept, frozen=True, kw_only=True):
    """One law on one model.

    kept             whether no case broke it
    cases            how many cases it was tried on, of how many that were planned: the rest did not fit the budget
    longest          tokens of the longest of them
    worst_ratio      error of the chunked run over the error of the full run, both against the reference (about 1 where
                     all is well, allowed 8); None for laws that are bit-equal
    worst_at         where that was: the token, and in what
    counterexamples  the smallest case that breaks it grossly, and the smallest that breaks it least; none where it is kept
    unavailable      why the law could not be tried at all: a model of single rows, or whose state cannot be forked
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
        found = not self.counterexamples
        if self.kept is None:
            force_setattr(self, "kept", found)
        elif self.kept is not found:
            raise ValueError(f"kept is {self.kept}, and there are {len(self.counterexamples)} counterexamples")

    @property
    def counterexample(self) -> str | None:
        """The first counterexample in words."""
        return self.counterexamples[0].message if self.counterexamples else None


class Certificate(Kept, frozen=True, kw_only=True):
    """The verdict on a model and what it rests on.

    dtype          the precision that was tried
    reference      what the errors were measured against
    longest        tokens of the longest sequence
    not_reached    boundaries of the model (windows, blocks) that no sequence came past
    limit          what the model does at lengths that it cannot read, if there are such
    limit_tokens   the most tokens that it reads in one piece, where it did not declare that itself
    limit_is_step  whether more can be read in several pieces
    state          bytes of the state after the longest sequence, how many more a token, and its precisions
    flips          tokens of mixtures of experts that were not compared, since two experts were as good as each other
    float32        for 16-bit models: the verdict on a copy in float32, where a fault shows that 16 bits hide
    chunking_used  how it was streamed; filled in by whoever does
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
    flips: int = 0
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
        """The laws for which there was no time."""
        return [name for name, law in self.laws.items() if not law.cases and law.unavailable == OUT_OF_TIME]

    @property
    def decisive(self) -> list[str]:
        """The broken laws that the verdict rests on; others may look broken for their reason alone."""
        for first in (("repeat", "isolation"), ("causality",), ("prefix",)):
            if self.broken & set(first):
                return [law for law in first if law in self.broken]
        return [law for law in self.laws if law in self.broken]

    def why_not(self) -> str:
        """The counterexamples that decided, with a line each that tries it again, and which other laws were broken too."""
        lines = []
        for name in self.decisive:
            for example in self.laws[name].counterexamples:
                lines += [f"  {name}: {example.message}", f"    {example.replay}"]
        if others := [law for law in self.laws if law in self.broken and law not in self.decisive]:
            lines.append(f"  broken too, maybe for the same reason: {', '.join(others)}")
        return "\n".join(lines)


class State(Kept, frozen=True):
    """bytes           of the state after the longest sequence, of `tokens` tokens
    bytes_per_token   how many more a token
    dtypes            its precisions
    """

    bytes: int
    tokens: int
    bytes_per_token: float
    dtypes: tuple[str, ...]


def rank(verdict: str) -> int | None:
    """The place of a verdict among `RANKS`, 0 for the best; None for one that says neither good nor bad.

    >>> rank("exact-any-chunk"), rank("exact-multiple-of-4"), rank("unproven")
    (0, 2, None)
    """
    return next((place for place, name in enumerate(RANKS) if verdict.startswith(name)), None)


def finite(value: float | None) -> float | None:
    """A number that JSON has, or None."""
    return None if value is None or not math.isfinite(value) else value
