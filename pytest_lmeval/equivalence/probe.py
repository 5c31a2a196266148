"""The probe: try every law on a model, by hypothesis, within a budget, and pronounce a verdict.

result = equivalence(as_model(my_module))
assert result.verdict == "exact-any-chunk", result
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, example, given, settings

from pytest_lmeval.equivalence.certificate import Certificate, LawResult, verdict_of
from pytest_lmeval.equivalence.laws import LAWS, NEED_STATE, LawBroken, Subject
from pytest_lmeval.equivalence.strategies import Case, cases, edge_cases
from pytest_lmeval.lm import Model, ModelError, fingerprint
from pytest_lmeval.results.metric import Metric
from pytest_lmeval.results.record import Record

LONGEST, STEPS_LONGEST = 160, 48
EXAMPLES = 12
BUDGET = 2.0  # seconds for all laws together; each law is tried on its edge cases at least until its share is used


@dataclass(frozen=True, repr=False)
class EquivalenceResult:
    """The verdict on a model, and the certificate behind it."""

    record: Record
    certificate: Certificate

    @property
    def verdict(self) -> str:
        """exact-any-chunk, exact-step-only, stateless, consistent, non-causal or inexact."""
        return self.certificate.verdict

    @property
    def laws(self) -> dict[str, LawResult]:
        return self.certificate.laws

    def __repr__(self) -> str:
        return f"{self.record.lm['spec']}: {self.verdict}\n{self.certificate.why_not()}".rstrip()


def equivalence(
    lm: Model, *, examples: int = EXAMPLES, longest: int | None = None, budget: float = BUDGET
) -> EquivalenceResult:
    """Which laws of streaming does `lm` keep? Found by trying, never by asking the model what it supports.

    examples   random cases a law, after the edge cases
    longest    tokens of the longest sequence; by default 160, or three times the model's window if that is more
    budget     seconds after which no further case is tried; the record says how many were
    """
    began = time.perf_counter()
    before = fingerprint(lm)
    subject = Subject(lm)
    longest = min(longest or _longest(lm), lm.context_length or 1 << 30)
    if longest < 2:
        raise ModelError(f"{lm.spec} reads at most {longest} token(s); the laws need two.")
    names = [law for law in LAWS if lm.stateful or law not in NEED_STATE]
    results = {name: _try(name, subject, longest, examples, budget / len(names)) for name in names}
    if (after := fingerprint(lm)) != before:
        changed = f"the model's weights or buffers were changed by reading (fingerprint {before} before, {after} after)."
        results["isolation"] = LawResult("isolation", results["isolation"].cases, None, changed)
    dtype = str(lm.dtype).removeprefix("torch.")
    certificate = Certificate(verdict_of(results, stateful=lm.stateful, dtype=dtype), dtype, subject.reference_kind, results)
    record = Record(
        kind="equivalence",
        subject="laws of streaming",
        lm=lm.facts(),
        settings={"examples": examples, "longest": longest, "budget": budget, "calls": subject.calls},
        metrics=_metrics(certificate),
        cost={"seconds": time.perf_counter() - began},
        certificate=certificate.to_json(),
    )
    return EquivalenceResult(record, certificate)


def restore(record: Record) -> EquivalenceResult:
    """The result that a record was made from."""
    data: dict[str, Any] = record.certificate or {}
    laws = {
        name: LawResult(name, law["cases"], law["worst_ratio"], law["counterexample"]) for name, law in data["laws"].items()
    }
    return EquivalenceResult(record, Certificate(data["verdict"], data["dtype"], data["reference"], laws))


def _try(name: str, subject: Subject, longest: int, examples: int, budget: float) -> LawResult:
    """Try one law on edge cases, then on random ones, and shrink what breaks it."""
    if name == "steps":
        longest = min(longest, STEPS_LONGEST)
    borders = tuple(border for border in subject.lm.borders if border < longest)
    tried, stop = 0, time.perf_counter() + budget

    def law(case: Case) -> None:
        nonlocal tried
        if tried and time.perf_counter() > stop:
            return
        tried += 1
        LAWS[name](subject, case)

    for case in reversed(edge_cases(longest, borders)):  # the last one given to hypothesis is tried first
        law = example(case=case)(law)
    law = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )(given(case=cases(longest, borders))(law))
    try:
        law()
    except LawBroken as broken:
        return LawResult(name, tried, subject.worst.get(name), str(broken))
    return LawResult(name, tried, subject.worst.get(name))


def _longest(lm: Model) -> int:
    window = max((border for border in lm.borders if border <= 512), default=0)
    return max(LONGEST, 3 * window + 7)


def _metrics(certificate: Certificate) -> dict[str, Metric]:
    laws = certificate.laws.values()
    metrics = {"laws_kept": Metric(sum(law.kept for law in laws), f"of {len(laws)}", higher_is_better=True)}
    if certificate.worst_ratio is not None and certificate.worst_ratio < 1e300:
        metrics["worst_ratio"] = Metric(certificate.worst_ratio, "", higher_is_better=False)
    return metrics
