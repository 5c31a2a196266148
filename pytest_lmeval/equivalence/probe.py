"""The probe: try every law on a model, by hypothesis, within a budget, and pronounce a verdict.

result = equivalence(as_model(my_module))
assert result.verdict == "exact-any-chunk", result
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, example, given, settings

from pytest_lmeval.equivalence.certificate import Certificate, LawResult, verdict_of
from pytest_lmeval.equivalence.laws import LAWS, NEED_STATE, LawBroken, NotPossible, Subject
from pytest_lmeval.equivalence.strategies import Case, aligned_cases, cases, edge_cases
from pytest_lmeval.identity import facts, weights_digest
from pytest_lmeval.lm import Model, ModelError
from pytest_lmeval.results.metric import Metric
from pytest_lmeval.results.record import Record

LONGEST, STEPS_LONGEST = 160, 48
EXAMPLES = 12
BUDGET = 2.0  # seconds for all laws together
FEWEST = 3  # cases a law that are tried however long they take: two short ones, and one long


@dataclass(frozen=True, repr=False)
class EquivalenceResult:
    """The verdict on a model, and the certificate behind it."""

    record: Record
    certificate: Certificate

    @property
    def verdict(self) -> str:
        """exact-any-chunk, exact-step-only, exact-multiple-of-K, stateless, consistent, or what is wrong: length-dependent,
        non-causal, inexact."""
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
    before = weights_digest(lm)
    subject = Subject(lm)
    longest = min(longest or _longest(lm), lm.context_length or 1 << 30)
    if longest < 2:
        raise ModelError(f"{lm.spec} reads at most {longest} token(s); the laws need two.")
    names = [law for law in LAWS if lm.stateful or law not in NEED_STATE]
    results = {}
    for place, name in enumerate(names, start=1):  # what one law leaves of the budget, the next may use
        results[name] = _try(name, subject, longest, examples, stop=began + budget * place / len(names))
    if weights_digest(lm) != before:
        changed = "the model's parameters or buffers are not what they were before it was read from."
        results["isolation"] = replace(results["isolation"], counterexample=changed)
    multiple = _multiple(subject, longest) if "splits" in results and not results["splits"].kept else None
    dtype = str(lm.dtype).removeprefix("torch.")
    certificate = Certificate(
        verdict_of(results, stateful=lm.stateful, dtype=dtype, multiple=multiple), dtype, subject.reference_kind, results
    )
    record = Record(
        kind="equivalence",
        subject="laws of streaming",
        lm=facts(lm),
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
        name: LawResult(name, law["cases"], law["planned"], law["worst_ratio"], law["counterexample"], law.get("unavailable"))
        for name, law in data["laws"].items()
    }
    return EquivalenceResult(record, Certificate(data["verdict"], data["dtype"], data["reference"], laws))


def _try(name: str, subject: Subject, longest: int, examples: int, *, stop: float) -> LawResult:
    """Try one law on edge cases, then on random ones until it is time to stop, and shrink what breaks it."""
    if name == "steps":
        longest = min(longest, STEPS_LONGEST)
    borders = tuple(border for border in subject.lm.borders if border < longest)
    edges = edge_cases(longest, borders)
    seen: dict[Case, LawBroken | None] = {}

    def law(case: Case) -> None:
        if case not in seen:
            if len(seen) >= FEWEST and time.perf_counter() > stop:
                return
            seen[case] = _broken(name, subject, case)
        if (broken := seen[case]) is not None:  # a case that failed once fails whenever hypothesis comes back to it
            raise broken

    for case in reversed(edges):  # the last one given to hypothesis is tried first
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
        counterexample = None
    except LawBroken as broken:
        counterexample = str(broken)
    except NotPossible as impossible:
        if not seen:
            return LawResult(name, 0, len(edges) + examples, unavailable=str(impossible))
        counterexample = f"after {len(seen)} case(s) that went well: {impossible}"
    return LawResult(name, len(seen), len(edges) + examples, subject.worst.get(name), counterexample)


def _multiple(subject: Subject, longest: int) -> int | None:
    """The smallest chunk length, of those that occur, in whose multiples the model is exact; None if there is none."""
    for k in sorted({2, 4, 8, 16, 32, 64, *subject.lm.borders}):
        tried = aligned_cases(k, longest)
        if tried and all(_broken("splits", subject, case) is None for case in tried):
            return k
    return None


def _broken(name: str, subject: Subject, case: Case) -> LawBroken | None:
    try:
        LAWS[name](subject, case)
    except LawBroken as broken:
        return broken
    return None


def _longest(lm: Model) -> int:
    window = max((border for border in lm.borders if border <= 512), default=0)
    return max(LONGEST, 3 * window + 7)


def _metrics(certificate: Certificate) -> dict[str, Metric]:
    laws = certificate.laws.values()
    metrics = {
        "laws_kept": Metric(sum(law.kept for law in laws), f"of {len(laws)}", higher_is_better=True),
        "cases": Metric(sum(law.cases for law in laws), f"of {sum(law.planned for law in laws)} planned"),
    }
    if certificate.worst_ratio is not None and math.isfinite(certificate.worst_ratio):
        metrics["worst_ratio"] = Metric(certificate.worst_ratio, "", higher_is_better=False)
    return metrics
