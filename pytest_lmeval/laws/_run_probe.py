"""The hearing of one model in one precision: every case goes to every law, and a certificate comes out.

First the cases that broke a law once, then the edge cases, then random ones that hypothesis draws, as long as there is time.
"""

from __future__ import annotations

import math
import time

from hypothesis import HealthCheck, Phase, Verbosity, given, settings, target

from pytest_lmeval.engine import Engine
from pytest_lmeval.errors import LawBroken
from pytest_lmeval.laws._checks import LAWS, check
from pytest_lmeval.laws._harness import MEMORY, Harness
from pytest_lmeval.laws._profiles import Profile
from pytest_lmeval.laws._search import Search
from pytest_lmeval.laws._states import state_sizes
from pytest_lmeval.laws._strategies import ESSENTIAL, Case, aligned_cases, cases, edge_cases, pieces, shortest_case
from pytest_lmeval.laws._verdict import verdict_of
from pytest_lmeval.models._model import state_dtypes
from pytest_lmeval.records._certificate import Certificate, LawResult, State

STEPS_LONGEST = 48
CORE = frozenset({"repeat", "causality", "prefix", "splits", "steps"})  # what streaming rests on: tried whatever it costs
QUICK = 4000  # calls that the budget has room for: then no edge case is left out, however busy the machine is
AFFORDABLE = 200  # likewise: then no essential one is
SEARCH = 0.75  # of the time; the rest is for making counterexamples small
EXTRA = 0.25  # of the budget, that may be spent on these beyond it


def hear(harness: Harness, longest: int, profile: Profile, known: list[tuple[str, Case]], stop: float) -> Certificate:
    """Try all laws until it is time to `stop`, and pronounce a verdict."""
    lm, began = harness.lm, time.perf_counter()
    limit = harness.reach(max([longest, *(case.length for _, case in known)]) if lm.context_length is None else longest)
    pause = harness.seconds_a_call()
    steps_longest = min(harness.longest, max(STEPS_LONGEST, int(0.04 * profile.budget / max(pause, 1e-9))))
    searches = {
        name: Search(name, harness, steps_longest if name == "steps" else harness.longest)
        for name, law in LAWS.items()
        if lm.stateful or not law.needs_state
    }
    for law, case in known:
        if law in searches:
            searches[law].attempt(case)
    _look(searches, profile, pause, min(longest, harness.longest), began + SEARCH * (stop - began), stop)
    results = _conclude(searches, stop, EXTRA * profile.budget)
    broken = frozenset(name for name, law in results.items() if not law.kept)
    multiple = None
    if "splits" in broken:
        latest = max(example.case["cuts"][-1] for example in results["splits"].counterexamples)
        multiple = _multiple(searches["splits"], latest, time.perf_counter() + profile.budget)
    dtype = str(harness.dtype).removeprefix("torch.")
    return Certificate(
        verdict=verdict_of(broken, stateful=lm.stateful, dtype=dtype, multiple=multiple),
        dtype=dtype,
        reference=harness.reference_kind,
        laws=results,
        longest=max(law.longest for law in results.values()),
        not_reached=tuple(
            boundary for boundary in lm.boundaries if boundary >= results["splits" if lm.stateful else "prefix"].longest
        ),
        limit=limit,
        limit_tokens=harness.longest if limit else None,
        limit_is_step=bool(limit) and harness.goes_on_past_its_reach(),
        state=_state(harness) if lm.stateful and time.perf_counter() < stop + profile.budget else None,
        flips=harness.flips,
    )


def _look(searches: dict[str, Search], profile: Profile, pause: float, longest: int, until: float, stop: float) -> None:
    """Edge cases, then random ones. Where a call is dear, the laws that streaming rests on come first, on a short case."""
    quick, affordable = pause * QUICK < profile.budget, pause * AFFORDABLE < profile.budget
    boundaries = tuple(boundary for boundary in next(iter(searches.values())).harness.lm.boundaries if boundary < longest)
    if not affordable:
        for name in sorted(searches, key=lambda name: name not in CORE):
            searches[name].attempt_in_time(shortest_case(longest), math.inf if name in CORE else stop)
        if boundaries and "splits" in searches:  # past all of them; what it is held to was read already
            searches["splits"].attempt(Case(longest, pieces(longest, max(1, longest // 3))))
    for place, case in enumerate(edge_cases(longest, boundaries)):
        for name, search in searches.items():
            must = quick or (affordable and place < (ESSENTIAL if name in CORE else 1))
            search.attempt_in_time(case, math.inf if must else until)

    def on_every_law(case: Case) -> None:
        for search in searches.values():
            search.attempt_in_time(case, until)
        worst = next(iter(searches.values())).harness.worst
        shares = [excess.share for excess, _ in worst.values() if 0 < excess.share < math.inf]
        target(math.log10(max(shares, default=1.0)))

    settings(
        max_examples=profile.examples,
        deadline=None,
        database=None,
        derandomize=profile.derandomize,
        phases=(Phase.generate, Phase.target),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )(given(case=cases(longest, boundaries))(on_every_law))()


def _conclude(searches: dict[str, Search], stop: float, extra: float) -> dict[str, LawResult]:
    """The results, counterexamples made small. Where splits break, single steps are trusted only as far as they were tried."""
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
    """The smallest chunk length, of those that occur, in whose multiples the model is exact; None if none was found in time.

    What is known to be wrong decides first: as it is, and with its cuts moved to the nearest multiples. A length of which no
    multiple lies as late as the `latest` cut that was found wrong was never where it would matter.
    """
    boundaries, longest = splits.harness.lm.boundaries, splits.longest
    failed = [failure.case for failure in splits.failures]
    for k in sorted({2, 4, 8, 16, 32, 64, *(boundary for boundary in boundaries if boundary < longest)}):
        if (longest - 1) // k * k < latest:
            continue
        moved = [Case(case.length, _moved(case, k), case.seed) for case in failed]
        tried = [case for case in moved if case.cuts] + aligned_cases(k, longest, boundaries)
        if len(tried) > len(moved) and not any(_breaks(splits, case, until) for case in tried):
            return k
    return None


def _moved(case: Case, k: int) -> tuple[int, ...]:
    near = {place for cut in case.cuts for place in (cut // k * k, -(-cut // k) * k)}
    return tuple(sorted(place for place in near if 0 < place < case.length))


def _breaks(splits: Search, case: Case, until: float) -> bool:
    """Whether it does, or there is no time to see that it does not."""
    if time.perf_counter() > until:
        return True
    try:
        check(splits.law, splits.harness, LAWS[splits.law].of(case))
    except LawBroken:
        return True
    return False


def _state(harness: Harness) -> State | None:
    """What the state weighs, how it grows, and in what precision it is."""
    try:
        held = state_sizes(harness, Case(harness.longest))
        _, state = Engine(harness.lm).step(harness.tokens(2, 0))
    except MEMORY:
        raise
    except Exception:  # noqa: BLE001 - nothing to weigh, or a model that cannot go on in pieces: the laws say so
        return None
    (seen, before), (end, after) = held[2 * len(held) // 3], held[-1]
    growth = (after - before) / max(1, end - seen)
    return State(after, end, growth, tuple(state_dtypes(state)))
