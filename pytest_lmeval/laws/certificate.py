"""What the probe found: law by law, and the verdict that follows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

EXACT, STEP_ONLY, INEXACT = "exact-any-chunk", "exact-step-only", "inexact"
MULTIPLE = "exact-multiple-of-"  # and the number
NON_CAUSAL, LENGTH_DEPENDENT = "non-causal", "length-dependent"
OUT_OF_TIME = "not tried: the budget was used up"
STATELESS, CONSISTENT = "stateless", "consistent"
LOW_PRECISION = ("float16", "bfloat16")

ONLY_ASIDE = frozenset({"rows", "fork", "resume", "size"})
"""Laws that one row, streamed once without a stop, does not rest on."""


@dataclass(frozen=True)
class Counterexample:
    """The smallest case found that breaks a law.

    case      what differs from the simplest case (`strategies.Case`)
    error     the largest error, in nats (logits, for a law that is bit-equal); None where it is no number
    message   what happened, where, and what is likely the matter
    replay    a line of Python that tries it again
    """

    case: dict[str, Any]
    error: float | None
    message: str
    replay: str


@dataclass(frozen=True)
class LawResult:
    """One law on one model.

    cases            how many cases it was tried on, of how many that were planned: the rest did not fit the budget
    longest          tokens of the longest of them
    worst_ratio      error of the chunked run over the error of the full run, both against the reference (about 1 where
                     all is well, allowed 8); None for laws that are bit-equal
    worst_at         where that was: the token, and in what
    counterexamples  the smallest case that breaks it grossly, and the smallest that breaks it least; none where it is kept
    unavailable      why the law could not be tried at all: a model of single rows, or whose state cannot be forked
    """

    law: str
    cases: int
    planned: int
    longest: int = 0
    worst_ratio: float | None = None
    worst_at: str | None = None
    counterexamples: tuple[Counterexample, ...] = ()
    unavailable: str | None = None

    @property
    def kept(self) -> bool:
        return not self.counterexamples

    @property
    def counterexample(self) -> str | None:
        """The first counterexample in words."""
        return self.counterexamples[0].message if self.counterexamples else None

    def to_json(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "cases": self.cases,
            "planned": self.planned,
            "longest": self.longest,
            "worst_ratio": finite(self.worst_ratio),
            "worst_at": self.worst_at,
            "counterexample": self.counterexample,
            "counterexamples": [asdict(example) for example in self.counterexamples],
            "unavailable": self.unavailable,
        }

    @classmethod
    def from_json(cls, law: str, data: dict[str, Any]) -> LawResult:
        own = {name: data.get(name) for name in ("cases", "planned", "worst_ratio", "worst_at", "unavailable")}
        found = tuple(Counterexample(**example) for example in data.get("counterexamples", ()))
        return cls(law, longest=data.get("longest", 0), counterexamples=found, **own)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Certificate:
    """The verdict on a model and what it rests on.

    dtype          the precision that was tried
    reference      what the errors were measured against
    longest        tokens of the longest sequence
    not_reached    borders of the model (windows, blocks) that no sequence came past
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
    reference: str
    laws: dict[str, LawResult] = field(default_factory=dict)
    longest: int = 0
    not_reached: tuple[int, ...] = ()
    limit: str | None = None
    limit_tokens: int | None = None
    limit_is_step: bool = False
    state: dict[str, Any] | None = None
    flips: int = 0
    float32: str | None = None
    chunking_used: str | None = None

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

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("verdict", "dtype", "reference", "longest", "limit")}
        return own | {
            "limit_tokens": self.limit_tokens,
            "limit_is_step": self.limit_is_step,
            "not_reached": list(self.not_reached),
            "state": self.state,
            "flips": self.flips,
            "float32": self.float32,
            "worst_ratio": finite(self.worst_ratio),
            "laws": {name: law.to_json() for name, law in self.laws.items()},
            "chunking_used": self.chunking_used,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Certificate:
        """The certificate that `to_json` wrote."""
        laws = {name: LawResult.from_json(name, law) for name, law in data["laws"].items()}
        own = {name: data[name] for name in cls.__dataclass_fields__ if name in data and name not in ("laws", "not_reached")}
        return cls(**own, laws=laws, not_reached=tuple(data.get("not_reached", ())))


def finite(value: float | None) -> float | None:
    """A number that JSON has, or None."""
    return None if value is None or not math.isfinite(value) else value


def multiple_of(verdict: str) -> int | None:
    """The K of `exact-multiple-of-K`; None for any other verdict."""
    return int(verdict.removeprefix(MULTIPLE)) if verdict.startswith(MULTIPLE) else None


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
