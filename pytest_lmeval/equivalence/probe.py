"""The probe: try every law on a model, within a budget, and pronounce a verdict.

result = equivalence(as_model(my_module))
assert result.verdict == "exact-any-chunk", result

Every case goes to every law: those that broke one before, then edge cases, then random ones that hypothesis draws. What breaks
a law is made small, explained, and printed with a line that tries it again (`replay`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings, target

from pytest_lmeval.equivalence.certificate import (
    CONSISTENT,
    LOW_PRECISION,
    Certificate,
    Counterexample,
    LawResult,
    verdict_of,
)
from pytest_lmeval.equivalence.evidence import LawBroken, NotPossible
from pytest_lmeval.equivalence.known import Known
from pytest_lmeval.equivalence.laws import LAWS, check
from pytest_lmeval.equivalence.profiles import PROFILES, Profile
from pytest_lmeval.equivalence.search import Search, counterexample
from pytest_lmeval.equivalence.states import state_sizes
from pytest_lmeval.equivalence.strategies import ESSENTIAL, Case, aligned_cases, cases, edge_cases
from pytest_lmeval.equivalence.trial import LONGEST, Raised, Trial
from pytest_lmeval.equivalence.twin import twin
from pytest_lmeval.equivalence.untouched import weights_kept
from pytest_lmeval.identity import facts
from pytest_lmeval.lm import Model, ModelError, state_dtypes
from pytest_lmeval.results.metric import Metric
from pytest_lmeval.results.record import Record

STEPS_LONGEST = 48
LARGEST_BORDER = 512  # of a window that is read past of its own accord; for a larger one, set `longest`
CORE = frozenset({"causality", "prefix", "splits", "steps"})  # what streaming rests on: never tried on a short case only
QUICK = 4000  # calls that the budget has room for: then no edge case is left out, however busy the machine is
AFFORDABLE = 200  # likewise: then no essential one is
SEARCH = 0.75  # of the budget; the rest is for making counterexamples small


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
        also = f" (a copy in float32: {self.certificate.float32})" if self.certificate.float32 else ""
        limit = f"\n  {self.certificate.limit}" if self.certificate.limit else ""
        return f"{self.record.lm['spec']}: {self.verdict}{also}{limit}\n{self.certificate.why_not()}".rstrip()


def equivalence(
    lm: Any,
    *,
    profile: str = "ci",
    budget: float | None = None,
    examples: int | None = None,
    longest: int | None = None,
    known: Path | None = None,
) -> EquivalenceResult:
    """Which laws of streaming does `lm` keep? Found by trying, never by asking the model what it supports.

    lm        a `Model`, or anything that `as_model` makes one of
    profile   "ci" (the same cases every time), "dev" (other random ones in each run), "nightly" (thousands, two minutes)
    budget    seconds after which no further case is tried, in place of the profile's; the certificate says what was covered
    examples  random cases, in place of the profile's
    longest   tokens of the longest sequence; by default 160, or three times the model's window if that is more
    known     a file of counterexamples, which are tried first, and to which new ones are added

    The model's weights and buffers are left as they were. Raises ModelError for a model that cannot be tried: it is in train
    mode, gives no numbers, or reads less than two tokens.
    """
    from pytest_lmeval.adapters import as_model

    lm, chosen = as_model(lm), PROFILES[profile]
    chosen = replace(chosen, budget=budget if budget is not None else chosen.budget, examples=examples or chosen.examples)
    began = time.perf_counter()
    _refuse_train_mode(lm)
    length = min(longest or _longest(lm), lm.context_length or 1 << 30)
    if length < 2:
        raise ModelError(f"{lm.spec} reads at most {length} token(s); the laws need two.")
    low = str(lm.dtype).removeprefix("torch.") in LOW_PRECISION
    in_float32 = twin(lm, torch.float32) if low else None
    with weights_kept(lm) as changed:
        trial, stop = Trial(lm), began + chosen.budget * (0.5 if in_float32 else 1.0)
        certificate = _certificate(trial, length, chosen, Known(known), stop)
        if changed_by := changed():
            certificate = _with(certificate, lm, "isolation", counterexample("isolation", Case(2), changed_by))
    if in_float32 is not None and certificate.verdict == CONSISTENT:
        certificate = _refuted_in_float32(certificate, trial, in_float32, length, chosen, began + chosen.budget)
    for name, law in certificate.laws.items():
        for example in law.counterexamples:
            Known(known).add(lm.spec, name, example.case)
    record = Record(
        kind="equivalence",
        subject="laws of streaming",
        lm=facts(lm),
        settings={"profile": profile, "examples": chosen.examples, "budget": chosen.budget, "calls": trial.calls},
        metrics=_metrics(certificate),
        cost={"seconds": time.perf_counter() - began, "state_bytes": (certificate.state or {}).get("bytes")},
        certificate=certificate.to_json(),
    )
    return EquivalenceResult(record, certificate)


def restore(record: Record) -> EquivalenceResult:
    """The result that a record was made from."""
    return EquivalenceResult(record, Certificate.from_json(record.certificate or {}))


def replay(lm: Any, law: str, *, longest: int = LONGEST, **case: Any) -> None:
    """Try one law on one case, as a counterexample prints it. Raises LawBroken where it is still broken.

    replay(my_model, "splits", length=8, cuts=(4,))
    """
    from pytest_lmeval.adapters import as_model
    from pytest_lmeval.equivalence.known import case_of

    model, tried = as_model(lm), case_of(case)
    check(law, Trial(model, min(max(longest, tried.length), model.context_length or 1 << 30)), tried)


def _certificate(trial: Trial, longest: int, profile: Profile, known: Known, stop: float) -> Certificate:
    """Try all laws on one model in one precision."""
    lm, began = trial.lm, time.perf_counter()
    limit = trial.reach(longest)
    longest, pause = trial.longest, trial.seconds_a_call()
    steps_longest = max(STEPS_LONGEST, int(0.04 * profile.budget / max(pause, 1e-9)))
    searches = {
        name: Search(name, trial, min(longest, steps_longest) if name == "steps" else longest)
        for name, law in LAWS.items()
        if lm.stateful or not law.needs_state
    }
    for law, case in known.cases(lm.spec):
        if law in searches:
            searches[law].attempt(case)
    quick, affordable = pause * QUICK < profile.budget, pause * AFFORDABLE < profile.budget
    search_until = began + SEARCH * (stop - began)
    borders = tuple(border for border in lm.borders if border < longest)
    for place, case in enumerate(edge_cases(longest, borders)):
        for name, search in searches.items():
            must = quick or place < (ESSENTIAL if affordable and name in CORE else 1)
            search.attempt_in_time(case, math.inf if must else search_until)

    def on_every_law(case: Case) -> None:
        for search in searches.values():
            search.attempt_in_time(case, search_until)
        shares = [worst.share for worst, _ in trial.worst.values() if 0 < worst.share < math.inf]
        target(math.log10(max(shares, default=1.0)))

    settings(
        max_examples=profile.examples,
        deadline=None,
        database=None,
        derandomize=profile.derandomize,
        phases=(Phase.generate, Phase.target),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )(given(case=cases(longest, borders))(on_every_law))()
    splits = searches.get("splits")
    multiple = _multiple(splits, longest) if splits is not None and splits.failures else None
    results = {name: search.result(stop) for name, search in searches.items()}
    dtype = str(lm.dtype).removeprefix("torch.")
    broken = frozenset(name for name, law in results.items() if not law.kept)
    return Certificate(
        verdict_of(broken, stateful=lm.stateful, dtype=dtype, multiple=multiple),
        dtype,
        trial.reference_kind,
        results,
        longest=longest,
        not_reached=tuple(border for border in lm.borders if border >= longest),
        limit=limit,
        limit_tokens=longest if limit else None,
        limit_is_step=bool(limit) and trial.goes_on_past_its_reach(),
        state=_state(trial) if lm.stateful else None,
        flips=trial.flips,
    )


def _multiple(splits: Search, longest: int) -> int | None:
    """The smallest chunk length, of those that occur, in whose multiples the model is exact; None if there is none."""
    for k in sorted({2, 4, 8, 16, 32, 64, *splits.trial.lm.borders}):
        if (tried := aligned_cases(k, longest)) and not any(_breaks(splits, case) for case in tried):
            return k
    return None


def _breaks(splits: Search, case: Case) -> bool:
    try:
        check(splits.law, splits.trial, LAWS[splits.law].of(case))
    except LawBroken:
        return True
    return False


def _state(trial: Trial) -> dict[str, Any] | None:
    """What the state weighs, how it grows, and in what precision it is."""
    try:
        held = state_sizes(trial, Case(trial.longest))
        with torch.no_grad():
            _, state = trial.lm.step(trial.tokens(2, 0))
    except (NotPossible, Raised, ModelError, RuntimeError, ValueError, IndexError, TypeError):
        return None  # a model that cannot go on in chunks: the law says so
    (seen, before), (end, after) = held[2 * len(held) // 3], held[-1]
    growth = (after - before) / max(1, end - seen)
    return {"bytes": after, "tokens": end, "bytes_per_token": growth, "dtypes": state_dtypes(state)}


def _refuted_in_float32(
    certificate: Certificate, trial: Trial, copy: Model, longest: int, profile: Profile, stop: float
) -> Certificate:
    """What 16 bits cannot see, a copy in float32 does. A fault that is larger there than the rounding of the 16 bits counts
    against the model; a smaller one is no larger than what its precision costs anyway."""
    noise = max(float(yardstick.full_error.max()) for yardstick in trial.yardsticks.values())
    try:
        found = _certificate(Trial(copy), longest, profile, Known(None), stop)
    except ModelError:
        return certificate
    certificate = replace(certificate, float32=found.verdict)
    for name, law in found.laws.items():
        errors = [example.error for example in law.counterexamples]
        if errors and (errors[0] is None or errors[0] > noise):
            said = f"a copy of it in float32: {law.counterexamples[0].message}"
            certificate = _with(certificate, trial.lm, name, replace(law.counterexamples[0], message=said), found.verdict)
    return certificate


def _with(certificate: Certificate, lm: Model, law: str, example: Counterexample, verdict: str | None = None) -> Certificate:
    """The certificate with one more counterexample, and the verdict that follows."""
    result = certificate.laws[law]
    laws = {**certificate.laws, law: replace(result, counterexamples=(*result.counterexamples, example))}
    broken = frozenset(name for name, found in laws.items() if not found.kept)
    verdict = verdict or verdict_of(broken, stateful=lm.stateful, dtype=certificate.dtype)
    return replace(certificate, laws=laws, verdict=verdict)


def _refuse_train_mode(lm: Model) -> None:
    training = [name or "the model itself" for name, part in lm.module.named_modules() if part.training] if lm.module else []
    if training:
        raise ModelError(
            f"{lm.spec} is in train mode ({len(training)} of its parts: {', '.join(training[:4])}"
            f"{', ...' if len(training) > 4 else ''}). Dropout and batch statistics would make every call another model. Call "
            "its eval() first."
        )


def _longest(lm: Model) -> int:
    window = max((border for border in lm.borders if border <= LARGEST_BORDER), default=0)
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
