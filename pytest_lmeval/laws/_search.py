"""Search for cases that break one law, and shrink what is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pytest_lmeval.engine._policy import CALL
from pytest_lmeval.errors import LawBroken, NotPossible, OutOfMemory
from pytest_lmeval.laws._checks import LAWS, check
from pytest_lmeval.laws._diagnosis import broken
from pytest_lmeval.laws._floors import LAST_SINGLES
from pytest_lmeval.laws._harness import FLOAT64, LONGEST, Harness
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.models._failures import unless_full
from pytest_lmeval.records._certificate import Counterexample, LawResult, finite

MOST_SHRINKS = 200
ENOUGH = 4  # cases that broke a law, after which it is not tried further
FIRST_SINGLES = 48  # tokens that are read one by one from the beginning
APART = 2  # decades between a gross failure and a subtle one that is shown beside it
AFTERMATH = 64  # tokens after a boundary from which a fault is diagnosed


class Search:
    """Try one law on cases, each once, and remember the outcomes.

    floor  the cases that it has to be tried on to count as kept
    """

    def __init__(self, law: str, harness: Harness, floor: tuple[Case, ...] = ()) -> None:
        self.law, self.harness = law, harness
        self.floor = tuple(dict.fromkeys(LAWS[law].relevant(case) for case in floor))
        self.seen: dict[Case, LawBroken | None] = {}  # in the order in which they were tried
        self.full: dict[Case, str] = {}  # those that ran out of memory, and where
        self.unavailable: str | None = None

    def fit(self, case: Case) -> Case:
        """The case as the law sees it, cut down to the longest sequence."""
        length = min(case.length, self.harness.longest)
        cuts = tuple(cut for cut in case.cuts if cut < length) or ((length - 1,) if LAWS[self.law].cut else ())
        before = min(case.before, self.harness.longest)
        return LAWS[self.law].relevant(replace(case, length=length, cuts=cuts, before=before))

    def drawn(self, case: Case) -> Case:
        """A case drawn for all laws, as this one tries it: single tokens are read a few at a time."""
        case = self.fit(case)
        if self.law != "steps":
            return case
        first = case.cuts[0] if case.cuts else 0
        singles = LAST_SINGLES if first > 1 else FIRST_SINGLES
        return replace(case, length=min(case.length, first + singles), cuts=case.cuts[:1])

    def cost(self, case: Case) -> int:
        """What one reading of the case costs, and its reference, in tokens; 0 if it was tried before."""
        if case in self.seen:
            return 0
        calls = case.length - sum(case.cuts[:1]) + len(case.cuts[:1]) if self.law == "steps" else len(case.cuts) + 1
        reference = 0 if case.seed in self.harness.references else (1 + FLOAT64) * (self.harness.longest + CALL)
        return case.length + CALL * calls + reference

    def attempt(self, case: Case) -> LawBroken | None:
        case = self.fit(case)
        too_large = any(case.length >= full.length and case.rows >= full.rows for full in self.full)
        if case not in self.seen and self.unavailable is None and not too_large:
            try:
                check(self.law, self.harness, case)
                self.seen[case] = None
            except LawBroken as failure:
                self.seen[case] = failure
            except OutOfMemory:
                self.full[case] = self.harness.work.full
            except NotPossible as impossible:
                if self.seen and not LAWS[self.law].optional:  # possible in some cases: broken in this one
                    message = f"{case}: {impossible}, though it could be tried in {len(self.seen)} other case(s)."
                    self.seen[case] = broken(case, message)
                else:
                    self.unavailable = str(impossible)
        return self.seen.get(case)

    def refute(self, case: Case) -> None:
        """Try a case that broke the law in an earlier run. Only if it breaks it again does it leave a trace."""
        harness, apart = self.harness, self.harness.apart()
        apart.longest = max(harness.longest, min(case.length, harness.lm.limit or case.length))
        if apart.longest > harness.longest and unless_full(lambda: apart.reads(apart.longest)) is not True:
            apart.longest = harness.longest
        search = Search(self.law, apart)
        if (failure := search.attempt(case)) is not None:
            harness.longest = apart.longest  # it is made smaller there
            self.seen[search.fit(case)] = failure

    @property
    def kept(self) -> list[Case]:
        return [case for case, failure in self.seen.items() if failure is None]

    @property
    def failures(self) -> list[LawBroken]:
        return [failure for failure in self.seen.values() if failure is not None]

    @property
    def settled(self) -> bool:
        """Whether it was broken so often, or cannot be tried, so that further cases tell nothing new."""
        return len(self.failures) >= ENOUGH or self.unavailable is not None

    def result(self, allowance: int, why_missing: str) -> LawResult:
        """The outcome, with the grossest failure and the subtlest if that is far from it, shrunk for `allowance` tokens."""
        cases, longest = len(self.seen), max((case.length for case in self.seen), default=0)
        worst, worst_at = self.harness.worst.get(self.law, (None, None))
        decades = {failure.decade: failure for failure in self.failures}
        small = []
        if decades:
            low, high = min(decades), max(decades)
            two_faults = high - low >= APART
            small.append(self._shrink(decades[high], range(high if two_faults else 0, 10), allowance))
            if two_faults:
                small.append(self._shrink(decades[low], range(high), allowance))
        missing = [case for case in self.floor if case not in self.seen]
        return LawResult(
            cases=cases,
            longest=longest,
            worst_ratio=None if worst is None else finite(worst.ratio),
            worst_at=None if worst is None else f"token {worst.position} of {worst_at}",
            counterexamples=tuple(small),
            missing=next(iter(self.full.values()), why_missing) if missing and not self.unavailable else None,
            unavailable=self.unavailable,
        )

    def _shrink(self, found: LawBroken, decades: range, allowance: int) -> Counterexample:
        stop = self.harness.work.cost + allowance

        def fails(case: Case) -> bool:
            failure = self.attempt(case)
            return failure is not None and failure.decade in decades

        case = shrink(found.case, fails, lambda: self.harness.work.cost < stop)
        small = self.seen[self.fit(case)] or found
        if small.likely and self.harness.work.cost < stop:  # the course of an error shows only if tokens come after it
            cuts = (*small.case.cuts, small.case.length) if small.case.cuts else ()
            longer = self.attempt(replace(small.case, length=small.case.length + AFTERMATH, cuts=cuts))
            small.likely = longer.likely if longer is not None and longer.decade in decades else small.likely
        choices, longest = small.case.choices(), self.harness.longest
        arguments = choices if longest == LONGEST else choices | {"longest": longest}
        line = "".join(f", {name}={value}" for name, value in arguments.items())
        return Counterexample(choices, finite(small.error), str(small), f'pytest_lmeval.replay(lm, "{self.law}"{line})')


def shrink(case: Case, fails: Callable[[Case], bool], may_go_on: Callable[[], bool]) -> Case:
    """A case that `fails` too and has no simpler neighbour that does, or the simplest found when no more may be tried.

    Hypothesis shrinks only what it drew. A case has few parts, so that a greedy search takes a few dozen calls.
    """
    tried = {case}
    simpler = _simpler(case)
    while len(tried) <= MOST_SHRINKS and may_go_on():
        candidate = next((other for other in simpler if other not in tried), None)
        if candidate is None:
            break
        tried.add(candidate)
        if fails(candidate):
            case, simpler = candidate, _simpler(candidate)
    return case


def _simpler(case: Case) -> Iterator[Case]:
    """Simpler neighbours, the boldest steps first."""
    cuts, length = case.cuts, case.length
    if len(cuts) > 1:
        for fewer in (*((cut,) for cut in cuts[:8]), cuts[: len(cuts) // 2], cuts[len(cuts) // 2 :]):
            yield replace(case, cuts=fewer)
    last = cuts[-1] if cuts else 1
    for shorter in sorted({8, length // 4, length // 2, last + 1, length - 8, length - 1}):
        if max(2, last + 1) <= shorter < length:
            yield replace(case, length=shorter)
    if len(cuts) > 1:
        kept = tuple(cut for cut in cuts if cut < length // 2)
        if kept and length // 2 > 1:
            yield replace(case, length=length // 2, cuts=kept)
    if 1 < len(cuts) <= 12:
        for cut in cuts:
            yield replace(case, cuts=tuple(other for other in cuts if other != cut))
    for index, cut in enumerate(cuts[:6]):
        before = cuts[index - 1] if index else 0
        for smaller in sorted({1, 2, cut // 2, cut - 1}):
            if before < smaller < cut:
                yield replace(case, cuts=(*cuts[:index], smaller, *cuts[index + 1 :]))
    if len(cuts) == 1 and cuts[0] > 1:  # all of it closer to the beginning
        for off in {cuts[0] // 2, 1} - {0}:
            yield replace(case, length=length - off, cuts=(cuts[0] - off,))
    for name, least in (("seed", 0), ("rows", 2), ("padding", 0), ("before", 1)):
        value = getattr(case, name)
        for smaller in sorted({least, (least + value) // 2, value - 1}):
            if least <= smaller < value:
                yield replace(case, **{name: smaller})
