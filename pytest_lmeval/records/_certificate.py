"""Certificates: the result of each law on a model, and the verdict that follows."""

from __future__ import annotations

import math
from typing import Any, Literal

from msgspec.structs import force_setattr

from pytest_lmeval.records._schema import StoredStruct

EXACT, STEP_ONLY, INEXACT = "exact-any-chunk", "exact-step-only", "inexact"
MULTIPLE = "exact-multiple-of-"  # followed by the number
NON_CAUSAL, LENGTH_DEPENDENT = "non-causal", "length-dependent"
STATELESS, CONSISTENT = "stateless", "consistent"
UNPROVEN = "unproven"  # no law is broken, and not every law that applies was tried at its floor
MOST_PACKED = 4096  # tokens
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

    kept             it was tried at its floor (`laws._floors`), and no case broke it
    cases            number of cases tried
    longest          tokens of the longest case
    worst_ratio      error of the chunked run over the error of the full run, both against the reference (about 1 if all is
                     well, at most 8 is allowed); None for bit-equal laws
    worst_at         token and output of the worst ratio
    counterexamples  the smallest case with a gross error and the smallest with the least error; empty if none broke it
    missing          what of its floor was not tried, and why; None if all was
    unavailable      why it does not apply to this model, such as one that reads single rows or whose state cannot be forked
    """

    cases: int
    kept: bool | None = None
    longest: int = 0
    worst_ratio: float | None = None
    worst_at: str | None = None
    counterexamples: tuple[Counterexample, ...] = ()
    missing: str | None = None
    unavailable: str | None = None

    def __post_init__(self) -> None:
        if self.kept is None:
            force_setattr(self, "kept", self.status == "kept")
        elif (self.kept, self.status) in ((True, "broken"), (False, "kept")):
            raise ValueError(f"kept is {self.kept}, and the law is {self.status}")

    @property
    def status(self) -> Literal["kept", "broken", "untried", "not applicable"]:
        if self.counterexamples:
            return "broken"
        return "not applicable" if self.unavailable else "untried" if self.missing or not self.cases else "kept"

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


class Costs(StoredStruct, frozen=True):
    """What reading costs a model, in tokens (see `engine._costs`); both are powers of two.

    call   cost of a call, beside its tokens
    reach  pairs of tokens, one of which sees the other, that cost as much as a token; 0: pairs cost nothing (no attention)
    """

    call: int
    reach: int

    @property
    def pack(self) -> int:
        """The tokens of several sequences in one row at which a token costs least: a power of two, 16 to 4,096.

        >>> Costs(call=32, reach=4096).pack
        256
        """
        return _power_of_two(self.call * self.reach)

    @property
    def chunk(self) -> int:
        """The same of one sequence, half of whose pairs have to be compared in any case.

        >>> Costs(call=32, reach=4096).chunk
        512
        """
        return _power_of_two(2 * self.call * self.reach)


def _power_of_two(square: int) -> int:
    """The largest power of two up to the root of a number, 16 to 4,096; the largest for 0."""
    return min(MOST_PACKED, max(16, 1 << math.isqrt(square).bit_length() - 1)) if square else MOST_PACKED


class Audit(StoredStruct, frozen=True):
    """How much of what was measured was read a second time, whole and alone, and compared.

    tokens      of a text, from its beginning
    questions   of a task
    answers     that were generated, read back in one piece
    difference  the largest difference of a log-probability between the two readings, nats
    share       tokens and calls of the second reading, as a fraction of those of the first
    full        tokens of a second reading that did not fit into memory, so that it was given up or read shorter; 0: all fitted
    """

    tokens: int = 0
    questions: int = 0
    answers: int = 0
    difference: float = 0.0
    share: float = 0.0
    full: int = 0

    def __str__(self) -> str:
        parts = [f"audited to {self.tokens:,} tokens"] if self.tokens else []
        counts = (self.questions, "question"), (self.answers, "answer")
        parts += [f"{count:,} {name}{'s' * (count > 1)} audited" for count, name in counts if count]
        why = [f"{self.full:,} tokens did not fit into memory again"] if self.full else []
        return ", ".join((parts or ["not audited"] * bool(why)) + why)


class Certificate(StoredStruct, frozen=True, kw_only=True):
    """The verdict on a model and its evidence.

    dtype          precision that was tested
    reference      what errors were measured against
    longest        tokens of the longest sequence
    not_reached    boundaries of the model (windows, blocks) that no sequence passed
    limit          what the model does at lengths that it cannot read, if there are any
    limit_tokens   most tokens that it reads in one step, unless it declares that itself
    limit_is_step  several steps can read more
    limit_rows     most rows that it reads at once; None: no known limit
    state          size and precisions of the state
    routing_ties   tokens of mixtures of experts that were not compared because two experts were tied
    rounding       largest error of a full run against its reference, nats
    float32        of a 16-bit model, the verdict on its float32 copy, which shows faults that 16 bits hide
    runs           number of runs whose cases it counts; the earlier ones were verified by replaying a case of each law
    costs          what calls cost the model
    chunking_used  how a record's model was streamed
    audit          what of a record's data was read again
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
    limit_rows: int | None = None
    state: State | None = None
    routing_ties: int = 0
    rounding: float | None = None
    float32: str | None = None
    runs: int = 1
    costs: Costs | None = None
    chunking_used: str | None = None
    audit: Audit | None = None

    @property
    def multiple(self) -> int | None:
        """The K of `exact-multiple-of-K`; None for any other verdict."""
        return int(self.verdict.removeprefix(MULTIPLE)) if self.verdict.startswith(MULTIPLE) else None

    @property
    def worst_ratio(self) -> float | None:
        return max((law.worst_ratio for law in self.laws.values() if law.worst_ratio is not None), default=None)

    def with_status(self, status: str) -> list[str]:
        """The laws that are "kept", "broken", "untried" or "not applicable"."""
        return [name for name, law in self.laws.items() if law.status == status]

    @property
    def broken(self) -> frozenset[str]:
        return frozenset(self.with_status("broken"))

    @property
    def applicable(self) -> list[str]:
        """The laws that the model could be tried on."""
        return [name for name, law in self.laws.items() if law.status != "not applicable"]

    @property
    def coverage(self) -> str:
        """What the verdict rests on: the laws kept, of those that apply, the longest sequence, and what was audited.

        >>> Certificate(verdict="unproven", dtype="float32", laws={"splits": LawResult(cases=0)}).coverage
        '0 of 1 laws'
        """
        reached = [f"up to {self.longest:,} tokens"] if self.longest else []
        audited = [str(self.audit)] if self.audit and str(self.audit) else []
        return ", ".join([f"{len(self.with_status('kept'))} of {len(self.applicable)} laws", *reached, *audited])

    @property
    def summary(self) -> str:
        """The verdict with its coverage, on one line."""
        return f"{self.verdict}, {self.coverage}" if self.laws else self.verdict

    @property
    def decisive(self) -> list[str]:
        """The broken laws that decide the verdict; they may be why others are broken."""
        for first in (("repeat", "isolation"), ("causality",), ("prefix",)):
            if self.broken & set(first):
                return [law for law in first if law in self.broken]
        return [law for law in self.laws if law in self.broken]

    def why_not(self) -> str:
        """The decisive counterexamples, each with its replay line, the names of the other broken laws, and what is missing."""
        lines = []
        for name in self.decisive:
            for example in self.laws[name].counterexamples:
                lines += [f"  {name}: {example.message}", f"    {example.replay}"]
        if others := [law for law in self.laws if law in self.broken and law not in self.decisive]:
            lines.append(f"  also broken, maybe for the same reason: {', '.join(others)}")
        missing: dict[str, list[str]] = {}
        for name in self.with_status("untried"):
            missing.setdefault(self.laws[name].missing or "not tried", []).append(name)
        lines += [f"  untried: {', '.join(names)} ({why})" for why, names in missing.items()]
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
