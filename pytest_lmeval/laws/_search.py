"""The search for a case that breaks one law, and what is made of it when one is found."""

from __future__ import annotations

import time
from dataclasses import replace

from pytest_lmeval.errors import LawBroken, NotPossible
from pytest_lmeval.laws._assertions import broken
from pytest_lmeval.laws._checks import LAWS, check
from pytest_lmeval.laws._harness import LONGEST, Harness
from pytest_lmeval.laws._shrink import smallest
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.records._certificate import OUT_OF_TIME, Counterexample, LawResult, finite

MOST_SHRINKS = 200
ENOUGH = 4  # cases that broke a law, after which it is not tried further
APART = 2  # decades between a gross failure and a subtle one that is shown beside it
AFTERMATH = 64  # tokens after a boundary by which a fault is judged


class Search:
    """Tries one law on the cases that it is given, each once, and remembers what happened."""

    def __init__(self, law: str, harness: Harness, longest: int) -> None:
        self.law, self.harness, self.longest = law, harness, longest
        self.seen: dict[Case, LawBroken | None] = {}
        self.left_out: set[Case] = set()
        self.unavailable: str | None = None

    def fit(self, case: Case) -> Case:
        """The case as the law sees it, no longer than it may be."""
        length = min(case.length, self.longest)
        cuts = tuple(cut for cut in case.cuts if cut < length) or (length - 1,)
        return LAWS[self.law].of(replace(case, length=length, cuts=cuts))

    def attempt(self, case: Case) -> LawBroken | None:
        case = self.fit(case)
        if case not in self.seen and self.unavailable is None:
            try:
                check(self.law, self.harness, case)
                self.seen[case] = None
            except LawBroken as failure:
                self.seen[case] = failure
            except NotPossible as impossible:
                self._impossible(case, impossible)
        return self.seen.get(case)

    def attempt_in_time(self, case: Case, stop: float) -> None:
        """Unless there is no time left for it, or enough was found."""
        if time.perf_counter() > stop:
            self.left_out.add(self.fit(case))
        elif len(self.failures) < ENOUGH:
            self.attempt(case)

    def _impossible(self, case: Case, impossible: NotPossible) -> None:
        """A law that cannot be tried at all is unavailable; one that could be, on other cases, is broken by this one."""
        if self.seen:
            said = f"{case}: {impossible}, though it could be tried in {len(self.seen)} other case(s)."
            self.seen[case] = broken(case, said)
        else:
            self.unavailable = str(impossible)

    @property
    def failures(self) -> list[LawBroken]:
        return [failure for failure in self.seen.values() if failure is not None]

    def result(self, stop: float) -> LawResult:
        """What was found; the grossest failure, and the subtlest where that is another, made small."""
        cases, longest = len(self.seen), max((case.length for case in self.seen), default=0)
        planned = cases + len(self.left_out - self.seen.keys())
        worst, worst_at = self.harness.worst.get(self.law, (None, None))
        decades = {failure.decade: failure for failure in self.failures}
        small = []
        if decades:
            low, high = min(decades), max(decades)
            two_faults = high - low >= APART  # else all of it is taken for one
            small.append(self._made_small(decades[high], range(high if two_faults else 0, 10), stop))
            if two_faults:
                small.append(self._made_small(decades[low], range(high), stop))
        return LawResult(
            cases=cases,
            planned=planned,
            longest=longest,
            worst_ratio=None if worst is None else finite(worst.ratio),
            worst_at=None if worst is None else f"token {worst.position} of {worst_at}",
            counterexamples=tuple(small),
            unavailable=self.unavailable or (None if cases else OUT_OF_TIME),
        )

    def _made_small(self, found: LawBroken, decades: range, stop: float) -> Counterexample:
        tried = 0

        def fails(case: Case) -> bool:
            nonlocal tried
            tried += 1
            failure = self.attempt(case)
            return failure is not None and failure.decade in decades

        case = smallest(found.case, fails, lambda: tried < MOST_SHRINKS and time.perf_counter() < stop)
        small = self.seen[self.fit(case)] or found
        if small.likely and time.perf_counter() < stop:  # how an error runs on can only be seen where something comes after it
            cuts = (*small.case.cuts, small.case.length) if small.case.cuts else ()
            longer = self.attempt(replace(small.case, length=small.case.length + AFTERMATH, cuts=cuts))
            small.likely = longer.likely if longer is not None and longer.decade in decades else small.likely
        return counterexample(self.law, small.case, str(small), small.error, self.harness.longest)


def counterexample(law: str, case: Case, message: str, error: float | None = None, longest: int = LONGEST) -> Counterexample:
    """The case with what it says, and a line that tries it again."""
    arguments = "".join(f", {name}={value}" for name, value in case.choices().items())
    further = f", longest={longest}" if longest != LONGEST else ""
    return Counterexample(case.choices(), finite(error), message, f'pytest_lmeval.replay(lm, "{law}"{arguments}{further})')
