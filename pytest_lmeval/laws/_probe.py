"""Probe a model: try every law on its floor and within a budget, reach a verdict, and replay a counterexample."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from msgspec import structs

from pytest_lmeval.engine._costs import costs_of
from pytest_lmeval.engine._policy import CALL
from pytest_lmeval.errors import ArgumentError, ModelError, no_such
from pytest_lmeval.laws._checks import LAWS, check
from pytest_lmeval.laws._counterexample_store import CounterexampleStore, case_of
from pytest_lmeval.laws._evidence import Evidence, EvidenceStore, Tried
from pytest_lmeval.laws._floors import floor_length
from pytest_lmeval.laws._harness import LONGEST, Harness
from pytest_lmeval.laws._run_probe import (
    LOW_PRECISION,
    PROFILES,
    Plan,
    Progress,
    floor_cost,
    run_probe,
    verdict_of,
)
from pytest_lmeval.laws._served import ServedHarness, nothing_tried
from pytest_lmeval.laws._weights import copy_of, preserve_weights
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model, weights
from pytest_lmeval.records._certificate import CONSISTENT, UNPROVEN, Certificate, Counterexample, LawResult
from pytest_lmeval.records._measured import Cost, Record
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value

READ = 160  # tokens of the reading in which the cost of a probe is given
LONG = 120.0  # seconds of a probe, from which the user is told before it starts
FURTHEST = 16  # times the longest sequence of a probe: longer counterexamples are not tried again


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
        """exact-any-chunk, exact-step-only, exact-multiple-of-K, stateless, consistent; what is wrong: length-dependent,
        non-causal, inexact; or unproven."""
        return self.certificate.verdict

    @property
    def laws(self) -> dict[str, LawResult]:
        return self.certificate.laws

    def __repr__(self) -> str:
        also = f" (a copy in float32: {self.certificate.float32})" if self.certificate.float32 else ""
        notes = f"\n  {self.certificate.limit}" if self.certificate.limit else ""
        if missing := self.certificate.not_reached:
            notes += f"\n  boundaries not reached: {', '.join(map(str, missing))} tokens; set longest="
        return f"{self.record.lm.spec}: {self.certificate.summary}{also}{notes}\n{self.certificate.why_not()}".rstrip()


def probe(
    lm: Any,
    *,
    profile: str = "ci",
    budget: int | None = None,
    examples: int | None = None,
    longest: int | None = None,
    counterexamples: Path | None = None,
    certificates: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> EquivalenceResult:
    """Find which laws of streaming `lm` keeps, by trying them, never by asking the model what it supports.

    lm               a `Model`, or anything that `as_model` takes
    profile          "ci" (the same cases every time, on every machine), "dev" (other random ones in each run), "nightly"
                     (thousands)
    budget           what the cases beyond the floors may cost, in tokens read (a call counts as 46 more, float64 four times);
                     by default the profile's, less for a large model. With 0 nothing is tried, and the verdict is `unproven`
    examples         random cases (default: the profile's)
    longest          tokens of the longest sequence; by default 320, or twice the model's largest boundary and one more. With
                     less, the verdict is `unproven`
    counterexamples  a file of earlier ones, which are tried first; new ones are appended
    certificates     a folder that keeps what was tried on each model: a later run with the profile "dev" or "nightly" replays a
                     case of each law, counts the others, and tries new ones; with "ci" it can only refute
    progress         called with the cost so far, the number of laws broken, and the cost expected
    say              called before a probe that takes more than a minute, with how long, and how to choose less

    Leaves weights, buffers and torch's random numbers as they were (`as_model` puts a module into eval mode). Raises ModelError
    for a model that cannot be tried: a part is in train mode, it gives no finite numbers, or reads less than two tokens.
    """
    from pytest_lmeval.models._sources import as_model

    if profile not in PROFILES:
        raise ArgumentError(no_such("profile", profile, PROFILES))
    if budget is not None and not (type(budget) is int and budget >= 0):
        raise ArgumentError(
            f"budget={budget!r}: expected a number of tokens, 0 or more, such as 200_000. Seconds do not count."
        )
    if longest is not None and longest < 2:
        raise ArgumentError(f"longest={longest}: the laws need sequences of two tokens at least.")
    lm, began, chosen = as_model(lm), time.perf_counter(), PROFILES[profile]
    _refuse_train_mode(lm)
    length = min(longest or floor_length(lm.boundaries, lm.context_length), lm.context_length or 1 << 30)
    if length < 2:
        raise ModelError(f"{lm.spec} reads at most {length} token(s); the laws need two.")
    parameters = sum(tensor.numel() for tensor in weights(lm.module))
    plan = Plan(
        longest=length,
        budget=chosen.budget_for(parameters) if budget is None else budget,
        examples=chosen.examples if examples is None else max(1, examples),
        derandomize=chosen.derandomize,
        drawn=Random(0) if chosen.derandomize else Random(),
    )
    certificate, harness, asked = _nothing_tried(lm), None, None
    if lm.served is not None and budget != 0:
        asked = ServedHarness(lm, length)
        asked.run(progress)
        certificate = asked.certificate()
    elif plan.budget or budget is None:
        stores = CounterexampleStore(counterexamples), EvidenceStore.of(certificates, lm, length)
        certificate, harness = _probed(lm, plan, *stores, progress, say)
    state = certificate.state
    work = harness.work if harness else None
    record = Record(
        kind="equivalence",
        subject="laws of streaming" if asked is None else "laws of a server",
        lm=facts(lm),
        settings={"profile": profile, "examples": plan.examples, "budget": plan.budget},
        details={"calls": asked.asked, "tokens": asked.tokens}
        if asked is not None
        else {}
        if work is None
        else {"calls": work.calls, "tokens": work.tokens, "work": work.cost, "reads": work.cost / (READ + CALL)},
        metrics=_metrics(certificate),
        cost=Cost(seconds=time.perf_counter() - began, state_bytes=None if state is None else state.bytes),
        certificate=certificate,
    )
    return EquivalenceResult(record)


def _probed(
    lm: Model,
    plan: Plan,
    counterexamples: CounterexampleStore,
    evidence: EvidenceStore,
    progress: Progress | None,
    say: Callable[[str], None] | None,
) -> tuple[Certificate, Harness]:
    low, earlier = str(lm.dtype).removeprefix("torch.") in LOW_PRECISION, evidence.load()
    with preserve_weights(lm) as changed, torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        harness = Harness(lm)
        if say is not None and not earlier.runs:
            _warn_of_a_long_probe(harness, plan, low, say)
        known = Tried(earlier.own.kept, counterexamples.cases(lm.spec, FURTHEST * plan.longest)) + Tried(
            broken=earlier.own.broken
        )
        certificate, tried, counted = run_probe(harness, plan, known, progress)
        certificate = structs.replace(certificate, costs=costs_of(lm))
        in_float32 = Tried()
        if "isolation" not in certificate.broken and (changed_by := changed()):
            message = f"{changed_by} It took the whole probe: no case of this law does it alone."
            example = Counterexample({"length": harness.longest}, None, message, "pytest_lmeval.laws.probe(lm)")
            certificate, tried = _with(certificate, lm, "isolation", example), Tried()
        if certificate.verdict == CONSISTENT and (copy := copy_of(lm, torch.float32)) is not None:
            certificate, in_float32 = _refuted_in_float32(certificate, harness, copy, plan, earlier.in_float32)
    for name, law in certificate.laws.items():
        for example in law.counterexamples:
            counterexamples.add(lm.spec, name, example.case)
    if tried.kept:
        evidence.save(earlier + Evidence(tried, in_float32, 1))
    return structs.replace(certificate, runs=1 + earlier.runs * counted), harness


def _nothing_tried(lm: Model) -> Certificate:
    missing = "a budget of 0 tries nothing; without --lmeval-budget every law is tried on its floor"
    if lm.served is not None:
        return nothing_tried(missing, lm.served.facts.dtype)
    laws = {name: LawResult(cases=0, missing=missing) for name, law in LAWS.items() if law.applies_to(lm)}
    return Certificate(verdict=UNPROVEN, dtype=str(lm.dtype).removeprefix("torch."), laws=laws)


def _warn_of_a_long_probe(harness: Harness, plan: Plan, low: bool, say: Callable[[str], None]) -> None:
    """Time a reading that the laws need anyway, and tell the user if the floors would take minutes."""
    harness.longest = plan.longest
    try:
        _ = harness.largest_continuation  # the first calls of a model take longer
        began = time.perf_counter()
        harness.reading(0, plan.longest, [plan.longest])
    except Exception:  # noqa: BLE001 - the probe says what is wrong
        return
    cost = (floor_cost(harness) + plan.budget) * (2 if low else 1)
    seconds = (time.perf_counter() - began) / (plan.longest + CALL) * cost
    if seconds > LONG:
        say(
            f"The laws of {harness.lm.spec} are tried on their floors before anything else is measured: about {cost:,} tokens, "
            f"{seconds / 60:.0f} minutes on {harness.lm.device}. With --lmeval-budget 0 nothing is tried: the verdict is "
            "`unproven`, and everything is read the slow, safe way."
        )


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
        harness = Harness(model)
        harness.find_longest(min(max(longest, tried.length), model.limit or 1 << 30))
        check(law, harness, tried)


def _refuted_in_float32(
    certificate: Certificate, harness: Harness, copy: Model, plan: Plan, earlier: Tried
) -> tuple[Certificate, Tried]:
    """Probe a copy in float32. A fault that is larger there than the rounding of 16 bits counts against the model."""
    noise = max((float(reference.full_error.max()) for reference in harness.references.values()), default=0.0)
    try:
        exact = Harness(copy, work=harness.work)
        found, tried, _ = run_probe(exact, plan, earlier)
    except ModelError:
        return certificate, earlier
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
    return certificate, tried


def _with(certificate: Certificate, lm: Model, law: str, example: Counterexample, verdict: str | None = None) -> Certificate:
    result = certificate.laws[law]
    laws = {**certificate.laws, law: structs.replace(result, kept=None, counterexamples=(*result.counterexamples, example))}
    changed = structs.replace(certificate, laws=laws)
    untried, multiple = any(not LAWS[name].optional for name in changed.with_status("untried")), certificate.multiple
    found = verdict_of(changed.broken, stateful=lm.stateful, dtype=certificate.dtype, multiple=multiple, untried=untried)
    return structs.replace(changed, verdict=verdict or found)


def _refuse_train_mode(lm: Model) -> None:
    training = [name or "the model itself" for name, part in lm.module.named_modules() if part.training] if lm.module else []
    if training:
        names = f"{', '.join(training[:4])}{', ...' if len(training) > 4 else ''}"
        raise ModelError(
            f"{lm.spec} is in train mode ({len(training)} of its parts: {names}), in which dropout and batch statistics make "
            "every call another model. Call its eval() first."
        )


def _metrics(certificate: Certificate) -> dict[str, Value]:
    kept, applicable = len(certificate.with_status("kept")), len(certificate.applicable)
    metrics = {
        "laws_kept": value_of("laws_kept", kept, unit=f"of {applicable}"),
        "cases": value_of("cases", sum(law.cases for law in certificate.laws.values())),
    }
    if certificate.worst_ratio is not None:
        metrics["worst_ratio"] = value_of("worst_ratio", certificate.worst_ratio)
    return metrics
