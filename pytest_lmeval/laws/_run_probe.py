"""Probe a model in one precision: try every law on its floor, then on further cases, and return a certificate.

Cases that broke a law before come first, then the floors, whatever they cost. Then, while the budget lasts, the edge cases,
every length of a chunk, and random cases drawn by hypothesis. The budget is a cost in tokens (`_harness.Work`), never a time:
the same cases are tried on a busy machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import HealthCheck, Phase, Verbosity, given, settings, target

from pytest_lmeval.laws._checks import LAWS, state_sizes
from pytest_lmeval.laws._evidence import Tried
from pytest_lmeval.laws._floors import floor_length, floors
from pytest_lmeval.laws._harness import Harness, Raised
from pytest_lmeval.laws._search import Search
from pytest_lmeval.laws._strategies import MANY, Case, aligned_cases, cases, edge_cases, every_chunk_length
from pytest_lmeval.records import _certificate as verdicts
from pytest_lmeval.records._certificate import Certificate, LawResult, State

EDGES = 160  # tokens of the edge cases of a model without boundaries
SHRINKING = 1 / 2  # of the cost so far, that shrinking a counterexample of `splits` may add; of other laws, half of that
MULTIPLES = 2.0  # times the cost so far, that the search for an exact multiple may add
SMALLEST_BUDGET = 1000
NEW = 450  # tokens of new cases in a run whose floors were tried before
LOW_PRECISION = ("float16", "bfloat16")

Progress = Callable[[int, float, int | None], None]
"""Called with the cost so far, the laws broken, and the cost expected."""


@dataclass(frozen=True)
class Profile:
    """examples     random cases, each tried on every law, after the edge cases
    budget       the most that cases beyond the floors may cost, in tokens
    passes       the same in multiply-adds of the weights, so that a large model is not searched for hours
    derandomize  the same cases in every run
    """

    examples: int
    budget: int
    passes: float
    derandomize: bool

    def budget_for(self, parameters: int) -> int:
        """The default budget of a model of this size, in tokens: 0, only the floors, where it would buy next to nothing."""
        tokens = int(min(self.budget, self.passes / max(1, parameters)))
        return tokens if tokens >= SMALLEST_BUDGET else 0


PROFILES = {
    "dev": Profile(examples=40, budget=80_000, passes=2e10, derandomize=False),
    "ci": Profile(examples=60, budget=80_000, passes=2e10, derandomize=True),
    "nightly": Profile(examples=2000, budget=20_000_000, passes=1e13, derandomize=False),
}


def default_profile() -> str:
    """`ci` if the environment says that this is a CI system, else `dev`."""
    return "ci" if os.environ.get("CI", "").lower() not in ("", "0", "false") else "dev"


@dataclass(frozen=True)
class Plan:
    """What a probe tries.

    longest      tokens of the longest sequence
    budget       cost of the cases beyond the floors, in tokens; with 0 nothing is tried at all
    examples     random cases
    derandomize  the same cases in every run
    drawn        draws the composition of the floor
    """

    longest: int
    budget: int
    examples: int
    derandomize: bool
    drawn: Random = field(default_factory=lambda: Random(0))


def run_probe(
    harness: Harness, plan: Plan, earlier: Tried, progress: Progress | None = None
) -> tuple[Certificate, Tried, bool]:
    """The certificate, what was tried, and whether the kept cases of `earlier` runs count in it.

    The cases that broke a law earlier are tried first; one that breaks it no more changes nothing. Then, unless the run is
    derandomized, the first case of each floor: if none breaks its law, the cases that did not break it earlier are taken as
    tried.
    """
    lm = harness.lm
    limit = harness.find_longest(plan.longest)
    needed = min(max(floor_length(lm.boundaries, lm.context_length), plan.longest), harness.longest if limit else 1 << 30)
    floor = floors(needed, plan.drawn)
    searches = {name: Search(name, harness, floor[name]) for name, law in LAWS.items() if law.applies_to(lm)}
    for name in searches.keys() & earlier.broken.keys():
        for case in earlier.broken[name]:
            searches[name].refute(case)
    counted = bool(earlier.kept) and not plan.derandomize and not any(search.failures for search in searches.values())
    if counted:
        for search in searches.values():
            search.attempt(search.floor[0])
        if counted := not any(search.failures or search.full for search in searches.values()):
            for name, search in searches.items():
                search.seen |= dict.fromkeys(case for case in earlier.kept.get(name, []) if case.length <= harness.longest)
    _try_floors(searches, harness, progress, plan.budget)
    _try_further_cases(searches, harness, replace(plan, budget=max(plan.budget, NEW * counted)), progress)
    why_missing = f"its floor needs sequences of {needed:,} tokens, and longest={plan.longest:,} was asked for"
    results = _results(searches, harness, why_missing)
    broken = frozenset(name for name, law in results.items() if law.status == "broken")
    multiple = None
    if "splits" in broken:
        latest = max(example.case["cuts"][-1] for example in results["splits"].counterexamples)
        multiple = _multiple(searches["splits"], latest, harness.work.cost + int(MULTIPLES * (harness.work.cost + plan.budget)))
    dtype = str(harness.dtype).removeprefix("torch.")
    reached = results["splits" if lm.stateful else "prefix"].longest
    untried = any(law.status == "untried" for name, law in results.items() if not LAWS[name].optional)
    certificate = Certificate(
        verdict=verdict_of(broken, stateful=lm.stateful, dtype=dtype, multiple=multiple, untried=untried),
        dtype=dtype,
        reference=harness.reference_kind,
        laws=results,
        longest=max(law.longest for law in results.values()),
        not_reached=tuple(boundary for boundary in lm.boundaries if boundary >= reached),
        limit=limit,
        limit_tokens=harness.most or (harness.longest if limit else None),
        limit_is_step=harness.most is not None,
        limit_rows=harness.most_rows,
        state=_state(harness) if lm.stateful else None,
        routing_ties=harness.routing_ties,
        rounding=verdicts.finite(
            max((float(reference.full_error.max()) for reference in harness.references.values()), default=math.nan)
        ),
    )
    kept = {name: search.kept for name, search in searches.items()}
    failed = {name: [failure.case for failure in search.failures] for name, search in searches.items()}
    return certificate, Tried(kept, failed), counted


def verdict_of(
    broken: frozenset[str], *, stateful: bool, dtype: str, multiple: int | None = None, untried: bool = False
) -> str:
    """The verdict that follows from the broken laws; `multiple` is the chunk length found exact if not all are.

    If a law is `untried`, a counterexample still counts, and nothing is proven.

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
    if untried:
        return verdicts.INEXACT if {"splits", "steps"} <= broken and not multiple else verdicts.UNPROVEN
    if not stateful:
        return verdicts.STATELESS
    if "splits" in broken and multiple:
        return f"{verdicts.MULTIPLE}{multiple}"
    if "steps" in broken:
        return verdicts.INEXACT
    if "splits" in broken:
        return verdicts.STEP_ONLY
    return verdicts.CONSISTENT if dtype in LOW_PRECISION else verdicts.EXACT


def _try_floors(searches: dict[str, Search], harness: Harness, progress: Progress | None, budget: int) -> None:
    expected = floor_cost(harness) + budget
    for search in searches.values():
        for case in search.floor:
            if case.length <= harness.longest and not search.settled:
                search.attempt(case)
                _show(progress, searches, harness, expected)


def floor_cost(harness: Harness) -> int:
    """About what the floors cost, in tokens."""
    return 6_500 + 19 * harness.longest


def _show(progress: Progress | None, searches: dict[str, Search], harness: Harness, expected: int) -> None:
    if progress is not None:
        progress(harness.work.cost, sum(bool(search.failures) for search in searches.values()), expected)


def _try_further_cases(searches: dict[str, Search], harness: Harness, plan: Plan, progress: Progress | None) -> None:
    """Try single tokens, every chunk length, edge cases, and random cases, until they have cost the budget."""
    until = harness.work.cost + plan.budget
    boundaries = tuple(boundary for boundary in harness.lm.boundaries if boundary < harness.longest)
    longest = harness.longest if boundaries else min(harness.longest, EDGES)

    def on_laws(case: Case, laws: dict[str, Search] = searches) -> None:
        for search in laws.values():
            tried = search.drawn(case)
            if not search.settled and harness.work.cost + search.cost(tried) <= until:
                search.attempt(tried)
        _show(progress, searches, harness, until)

    def on_every_law(case: Case) -> None:
        on_laws(case)
        if not plan.derandomize:  # what it learns from are errors, which differ from machine to machine
            ratios = [excess.tolerance_ratio for excess, _ in harness.worst.values() if 0 < excess.tolerance_ratio < math.inf]
            target(math.log10(max(ratios, default=1.0)))

    if "steps" in searches:
        on_laws(Case(longest, seed=1), {"steps": searches["steps"]})
    for case in every_chunk_length(harness.longest) if "splits" in searches else ():
        on_laws(case, {"splits": searches["splits"]})
    for case in edge_cases(longest, boundaries):
        on_laws(case)
    if harness.work.cost < until:
        settings(
            max_examples=plan.examples,
            deadline=None,
            database=None,
            derandomize=plan.derandomize,
            phases=(Phase.generate,) if plan.derandomize else (Phase.generate, Phase.target),
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )(given(case=cases(harness.longest, boundaries))(on_every_law))()


def _results(searches: dict[str, Search], harness: Harness, why_missing: str) -> dict[str, LawResult]:
    """The results, counterexamples shrunk. If splits break, single steps are tried as far as they did."""
    results, allowance = {}, int(SHRINKING * harness.work.cost)
    if "splits" in searches:
        results["splits"] = searches["splits"].result(allowance, why_missing)
        for example in results["splits"].counterexamples:
            length = min(example.case["length"] + 8, harness.longest)
            searches["steps"].attempt(Case(length, seed=example.case.get("seed", 0)))
    for name, search in searches.items():
        if name != "splits":
            results[name] = search.result(allowance // 2, why_missing)
    return {name: results[name] for name in searches}


def _multiple(splits: Search, latest: int, until: int) -> int | None:
    """The smallest common chunk length in whose multiples the model is exact; None if none was found at a cost below `until`.

    Try the failed cases first, cuts moved to the nearest multiples. Skip K if its many chunks do not fit the sequence, or do
    not reach the `latest` failing cut.
    """
    harness = splits.harness
    boundaries, context = harness.lm.boundaries, harness.lm.limit or 1 << 30
    failed = [failure.case for failure in splits.failures]
    for k in sorted({2, 4, 8, 16, 32, 64, *boundaries}):
        longest = max(harness.longest, min((MANY + 1) * k, context))
        if MANY * k >= longest or (longest - 1) // k * k < latest:
            continue
        moved = [Case(case.length, cuts, case.seed) for case in failed if (cuts := _nearest_multiples(case, k))]
        before, harness.longest = harness.longest, longest
        aligned = aligned_cases(k, longest, boundaries)
        try:
            if not any(harness.work.cost > until or splits.attempt(case) or splits.full for case in moved + aligned):
                return k
        except Raised:  # the longer sequence, in one call
            continue
        finally:
            harness.longest = before
    return None


def _nearest_multiples(case: Case, k: int) -> tuple[int, ...]:
    near = {multiple for cut in case.cuts for multiple in (cut // k * k, -(-cut // k) * k)}
    return tuple(sorted(multiple for multiple in near if 0 < multiple < case.length))


def _state(harness: Harness) -> State | None:
    try:
        (seen, before), (end, after), dtypes = state_sizes(harness, Case(harness.longest))
    except Exception:  # noqa: BLE001 - no tensor, no memory, or a model that cannot go on in chunks: the laws say so
        return None
    return State(after, end, (after - before) / max(1, end - seen), dtypes)
