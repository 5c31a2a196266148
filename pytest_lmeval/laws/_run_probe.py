"""Probe a model in one precision: try every case on every law, and return a certificate.

Cases that broke a law before come first, then the edge cases, then random ones drawn by hypothesis while there is time.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, Verbosity, given, settings, target

from pytest_lmeval.engine import Engine
from pytest_lmeval.laws._checks import LAWS, state_sizes
from pytest_lmeval.laws._harness import MEMORY, Harness
from pytest_lmeval.laws._search import Search
from pytest_lmeval.laws._strategies import ESSENTIAL, Case, aligned_cases, cases, chunk_cuts, edge_cases, shortest_case
from pytest_lmeval.models._model import state_dtypes
from pytest_lmeval.records import _certificate as verdicts
from pytest_lmeval.records._certificate import Certificate, LawResult, State

STEPS_LONGEST = 48
CORE = frozenset({"repeat", "causality", "prefix", "splits", "steps"})  # streaming rests on them: tried whatever they cost
QUICK = 4000  # calls within the budget: then no edge case is left out, however busy the machine is
AFFORDABLE = 200  # likewise: then no essential one is
SEARCH = 0.75  # of the time; the rest is for shrinking
EXTRA = 0.25  # of the budget, that shrinking may take beyond it
LOW_PRECISION = ("float16", "bfloat16")


@dataclass(frozen=True)
class Profile:
    """examples     random cases, each tried on every law, after the edge cases
    budget       seconds after which no further case is tried
    derandomize  the same cases in every run
    """

    examples: int
    budget: float
    derandomize: bool


PROFILES = {
    "dev": Profile(examples=40, budget=2.0, derandomize=False),
    "ci": Profile(examples=60, budget=2.0, derandomize=True),
    "nightly": Profile(examples=2000, budget=120.0, derandomize=False),
}


def default_profile() -> str:
    """`ci` if the environment says that this is a CI system, else `dev`."""
    return "ci" if os.environ.get("CI", "").lower() not in ("", "0", "false") else "dev"


def run_probe(harness: Harness, longest: int, profile: Profile, stored: list[tuple[str, Case]], stop: float) -> Certificate:
    """Try all laws until `stop`, on the clock of `time.perf_counter`; first the (law, case) of `stored` counterexamples."""
    lm, began = harness.lm, time.perf_counter()
    furthest = max([longest, *(case.length for _, case in stored)]) if lm.context_length is None else longest
    limit = harness.find_longest(furthest)
    pause = harness.seconds_a_call()
    steps_longest = min(harness.longest, max(STEPS_LONGEST, int(0.04 * profile.budget / max(pause, 1e-9))))
    searches = {
        name: Search(name, harness, steps_longest if name == "steps" else harness.longest)
        for name, law in LAWS.items()
        if lm.stateful or not law.needs_state
    }
    for law, case in stored:
        if law in searches:
            searches[law].attempt(case)
    _try_cases(searches, harness, profile, pause, min(longest, harness.longest), began + SEARCH * (stop - began), stop)
    results = _results(searches, stop, EXTRA * profile.budget)
    broken = frozenset(name for name, law in results.items() if not law.kept)
    multiple = None
    if "splits" in broken:
        latest = max(example.case["cuts"][-1] for example in results["splits"].counterexamples)
        multiple = _multiple(searches["splits"], latest, time.perf_counter() + profile.budget)
    dtype = str(harness.dtype).removeprefix("torch.")
    reached = results["splits" if lm.stateful else "prefix"].longest
    return Certificate(
        verdict=verdict_of(broken, stateful=lm.stateful, dtype=dtype, multiple=multiple),
        dtype=dtype,
        reference=harness.reference_kind,
        laws=results,
        longest=max(law.longest for law in results.values()),
        not_reached=tuple(boundary for boundary in lm.boundaries if boundary >= reached),
        limit=limit,
        limit_tokens=harness.longest if limit else None,
        limit_is_step=bool(limit) and harness.continues_past_longest(),
        state=_state(harness) if lm.stateful and time.perf_counter() < stop + profile.budget else None,
        routing_ties=harness.routing_ties,
    )


def verdict_of(broken: frozenset[str], *, stateful: bool, dtype: str, multiple: int | None = None) -> str:
    """The verdict that follows from the broken laws; `multiple` is the chunk length found exact if not all are.

    A model that is not repeatable or isolated may seem to break other laws for that reason alone, so these decide first. 16-bit
    arithmetic hides small faults, so a model that breaks nothing there is `consistent`: not refuted, not proven.
    """
    if broken & {"repeat", "isolation"}:
        return verdicts.INEXACT
    if "causality" in broken:
        return verdicts.NON_CAUSAL
    if "prefix" in broken:
        return verdicts.LENGTH_DEPENDENT
    if broken - {"splits", "steps"}:
        return verdicts.INEXACT
    if not stateful:
        return verdicts.STATELESS
    if "splits" in broken and multiple:
        return f"{verdicts.MULTIPLE}{multiple}"
    if "steps" in broken:
        return verdicts.INEXACT
    if "splits" in broken:
        return verdicts.STEP_ONLY
    return verdicts.CONSISTENT if dtype in LOW_PRECISION else verdicts.EXACT


def _try_cases(
    searches: dict[str, Search], harness: Harness, profile: Profile, pause: float, longest: int, until: float, stop: float
) -> None:
    """Try edge cases, then random ones. If calls are slow, try the core laws first, on a short case."""
    quick, affordable = pause * QUICK < profile.budget, pause * AFFORDABLE < profile.budget
    boundaries = tuple(boundary for boundary in harness.lm.boundaries if boundary < longest)
    if not affordable:
        for name in sorted(searches, key=lambda name: name not in CORE):
            searches[name].attempt_in_time(shortest_case(longest), math.inf if name in CORE else stop)
        if boundaries and "splits" in searches:  # past all of them; the reference is there already
            searches["splits"].attempt(Case(longest, chunk_cuts(longest, max(1, longest // 3))))
    for index, case in enumerate(edge_cases(longest, boundaries)):
        for name, search in searches.items():
            must = quick or (affordable and index < (ESSENTIAL if name in CORE else 1))
            search.attempt_in_time(case, math.inf if must else until)

    def on_every_law(case: Case) -> None:
        for search in searches.values():
            search.attempt_in_time(case, until)
        ratios = [excess.tolerance_ratio for excess, _ in harness.worst.values() if 0 < excess.tolerance_ratio < math.inf]
        target(math.log10(max(ratios, default=1.0)))

    settings(
        max_examples=profile.examples,
        deadline=None,
        database=None,
        derandomize=profile.derandomize,
        phases=(Phase.generate, Phase.target),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )(given(case=cases(longest, boundaries))(on_every_law))()


def _results(searches: dict[str, Search], stop: float, extra: float) -> dict[str, LawResult]:
    """The results, counterexamples shrunk. If splits break, single steps are tried as far as they did."""
    results = {}
    if "splits" in searches:
        results["splits"] = searches["splits"].result(max(stop, time.perf_counter() + extra))
        for example in results["splits"].counterexamples:
            steps = searches["steps"]
            length = min(example.case["length"] + 8, steps.harness.longest)
            steps.longest = max(steps.longest, length)
            steps.attempt(Case(length, seed=example.case.get("seed", 0)))
    for name, search in searches.items():
        if name != "splits":
            results[name] = search.result(max(stop, time.perf_counter() + extra / len(searches)))
    return {name: results[name] for name in searches}


def _multiple(splits: Search, latest: int, until: float) -> int | None:
    """The smallest common chunk length in whose multiples the model is exact; None if none was found in time.

    Try the failed cases first, cuts moved to the nearest multiples. Skip K if no multiple reaches the `latest` failing cut.
    """
    boundaries, longest = splits.harness.lm.boundaries, splits.longest
    failed = [failure.case for failure in splits.failures]
    for k in sorted({2, 4, 8, 16, 32, 64, *(boundary for boundary in boundaries if boundary < longest)}):
        if (longest - 1) // k * k < latest:
            continue
        moved = [Case(case.length, cuts, case.seed) for case in failed if (cuts := _nearest_multiples(case, k))]
        aligned = aligned_cases(k, longest, boundaries)
        if aligned and not any(time.perf_counter() > until or splits.attempt(case) for case in moved + aligned):
            return k
    return None


def _nearest_multiples(case: Case, k: int) -> tuple[int, ...]:
    near = {multiple for cut in case.cuts for multiple in (cut // k * k, -(-cut // k) * k)}
    return tuple(sorted(multiple for multiple in near if 0 < multiple < case.length))


def _state(harness: Harness) -> State | None:
    try:
        held = state_sizes(harness, Case(harness.longest))
        _, state = Engine(harness.lm).step(harness.tokens(2, 0))
    except MEMORY:
        raise
    except Exception:  # noqa: BLE001 - no tensor, or a model that cannot go on in chunks: the laws say so
        return None
    (seen, before), (end, after) = held[2 * len(held) // 3], held[-1]
    growth = (after - before) / max(1, end - seen)
    return State(after, end, growth, tuple(state_dtypes(state)))
