"""Probe a model: try every law within a budget, reach a verdict, and replay a counterexample."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from pytest_lmeval.errors import ArgumentError, ModelError, no_such
from pytest_lmeval.laws._checks import check
from pytest_lmeval.laws._counterexample_store import CounterexampleStore, case_of
from pytest_lmeval.laws._harness import LONGEST, Harness
from pytest_lmeval.laws._run_probe import LOW_PRECISION, PROFILES, Profile, run_probe, verdict_of
from pytest_lmeval.laws._weights import copy_of, preserve_weights
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import CONSISTENT, Certificate, Counterexample, LawResult
from pytest_lmeval.records._measured import Cost, Record
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value

LARGEST_BOUNDARY = 512  # sequences pass it by default; for a larger window, set `longest`


@dataclass(frozen=True, repr=False)
class EquivalenceResult:
    """The verdict on a model, and the certificate behind it."""

    record: Record

    @property
    def certificate(self) -> Certificate:
        assert self.record.certificate is not None
        return self.record.certificate

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
        notes = f"\n  {self.certificate.limit}" if self.certificate.limit else ""
        if missing := self.certificate.not_reached:
            notes += f"\n  boundaries not reached: {', '.join(map(str, missing))} tokens; set longest="
        if untried := self.certificate.untried:
            notes += f"\n  not tried, since the budget was used up: {', '.join(untried)}"
        return f"{self.record.lm.spec}: {self.verdict}{also}{notes}\n{self.certificate.why_not()}".rstrip()


def probe(
    lm: Any,
    *,
    profile: str = "ci",
    budget: float | None = None,
    examples: int | None = None,
    longest: int | None = None,
    counterexamples: Path | None = None,
) -> EquivalenceResult:
    """Find which laws of streaming `lm` keeps, by trying them, never by asking the model what it supports.

    lm               a `Model`, or anything that `as_model` takes
    profile          "ci" (the same cases every time), "dev" (other random ones in each run), "nightly" (thousands, two minutes)
    budget           seconds after which no case is tried (default: the profile's); the certificate says what was covered
    examples         random cases (default: the profile's)
    longest          tokens of the longest sequence; by default 160, or three times the model's window if that is more
    counterexamples  a file of earlier ones, which are tried first; new ones are appended

    Leaves weights, buffers and torch's random numbers as they were (`as_model` puts a module into eval mode). Raises ModelError
    for a model that cannot be tried: a part is in train mode, it gives no finite numbers, or reads less than two tokens.
    """
    from pytest_lmeval.models._sources import as_model

    if profile not in PROFILES:
        raise ArgumentError(no_such("profile", profile, PROFILES))
    lm, began, chosen = as_model(lm), time.perf_counter(), PROFILES[profile]
    if budget is not None:
        chosen = replace(chosen, budget=budget)
    if examples is not None:
        chosen = replace(chosen, examples=max(1, examples))
    _refuse_train_mode(lm)
    window = max((boundary for boundary in lm.boundaries if boundary <= LARGEST_BOUNDARY), default=0)
    length = min(longest or max(LONGEST, 3 * window + 7), lm.context_length or 1 << 30)
    if length < 2:
        raise ModelError(f"{lm.spec} reads at most {length} token(s); the laws need two.")
    low = str(lm.dtype).removeprefix("torch.") in LOW_PRECISION
    in_float32 = copy_of(lm, torch.float32) if low else None
    store = CounterexampleStore(counterexamples)
    with preserve_weights(lm) as changed, torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        harness, stop = Harness(lm), began + chosen.budget * (0.5 if in_float32 else 1.0)
        certificate = run_probe(harness, length, chosen, store.cases(lm.spec), stop)
        if "isolation" not in certificate.broken and (changed_by := changed()):
            message = f"{changed_by} It took the whole probe: no case of this law does it alone."
            example = Counterexample({"length": harness.longest}, None, message, "pytest_lmeval.laws.probe(lm)")
            certificate = _with(certificate, lm, "isolation", example)
        if in_float32 is not None and certificate.verdict == CONSISTENT:
            certificate = _refuted_in_float32(certificate, harness, in_float32, length, chosen, began + chosen.budget)
    for name, law in certificate.laws.items():
        for example in law.counterexamples:
            store.add(lm.spec, name, example.case)
    state = certificate.state
    record = Record(
        kind="equivalence",
        subject="laws of streaming",
        lm=facts(lm),
        settings={"profile": profile, "examples": chosen.examples, "budget": chosen.budget},
        details={"calls": harness.calls},
        metrics=_metrics(certificate),
        cost=Cost(seconds=time.perf_counter() - began, state_bytes=None if state is None else state.bytes),
        certificate=certificate,
    )
    return EquivalenceResult(record)


def replay(lm: Any, law: str, *, longest: int = LONGEST, float32: bool = False, **case: Any) -> None:
    """Try one law on one case, as a counterexample prints it: `replay(my_model, "splits", length=8, cuts=(4,))`.

    float32  try it on a copy in that precision

    Raises LawBroken while the law is broken, and ArgumentError for an unknown law or an impossible case.
    """
    from pytest_lmeval.models._sources import as_model

    model, tried = as_model(lm), case_of(case)
    if float32 and (copy := copy_of(model, torch.float32)) is not None:
        model = copy
    with preserve_weights(model):
        check(law, Harness(model, min(max(longest, tried.length), model.limit or 1 << 30)), tried)


def _refuted_in_float32(
    certificate: Certificate, harness: Harness, copy: Model, longest: int, profile: Profile, stop: float
) -> Certificate:
    """Probe a copy in float32. A fault that is larger there than the rounding of 16 bits counts against the model."""
    noise = max(float(reference.full_error.max()) for reference in harness.references.values())
    try:
        exact = Harness(copy)
        found = run_probe(exact, longest, profile, [], stop)
    except ModelError:
        return certificate
    certificate = structs.replace(certificate, float32=found.verdict)
    for name, law in found.laws.items():
        if not law.counterexamples:
            continue
        example = law.counterexamples[0]
        largest = exact.worst[name][0].error if name in exact.worst else example.error
        if largest is None or largest > noise:
            message = f"a copy of it in float32: {example.message}"
            example = structs.replace(example, message=message, replay=f"{example.replay[:-1]}, float32=True)")
            certificate = _with(certificate, harness.lm, name, example, found.verdict)
    return certificate


def _with(certificate: Certificate, lm: Model, law: str, example: Counterexample, verdict: str | None = None) -> Certificate:
    result = certificate.laws[law]
    laws = {**certificate.laws, law: structs.replace(result, kept=None, counterexamples=(*result.counterexamples, example))}
    found = frozenset(name for name, law_result in laws.items() if not law_result.kept)
    verdict = verdict or verdict_of(found, stateful=lm.stateful, dtype=certificate.dtype)
    return structs.replace(certificate, laws=laws, verdict=verdict)


def _refuse_train_mode(lm: Model) -> None:
    training = [name or "the model itself" for name, part in lm.module.named_modules() if part.training] if lm.module else []
    if training:
        names = f"{', '.join(training[:4])}{', ...' if len(training) > 4 else ''}"
        raise ModelError(
            f"{lm.spec} is in train mode ({len(training)} of its parts: {names}), in which dropout and batch statistics make "
            "every call another model. Call its eval() first."
        )


def _metrics(certificate: Certificate) -> dict[str, Value]:
    laws = certificate.laws.values()
    metrics = {
        "laws_kept": value_of("laws_kept", sum(bool(law.kept) for law in laws), unit=f"of {len(laws)}"),
        "cases": value_of("cases", sum(law.cases for law in laws), unit=f"of {sum(law.planned for law in laws)} planned"),
    }
    if certificate.worst_ratio is not None:
        metrics["worst_ratio"] = value_of("worst_ratio", certificate.worst_ratio)
    return metrics
