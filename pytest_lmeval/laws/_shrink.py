"""The smallest case that still breaks a law in the same way.

hypothesis does not shrink explicit cases, and knows nothing of where in a sequence the error stands. A case has few parts, each
with an order of its own, so trying simpler ones greedily comes to the same in a few dozen calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pytest_lmeval.laws._strategies import Case


def smallest(case: Case, fails: Callable[[Case], bool], may_go_on: Callable[[], bool]) -> Case:
    """The case that `fails` too and has no simpler neighbour that does, or what was reached when no more could be tried."""
    tried = {case}
    simpler = _simpler(case)
    while may_go_on():
        candidate = next((other for other in simpler if other not in tried), None)
        if candidate is None:
            break
        tried.add(candidate)
        if fails(candidate):
            case, simpler = candidate, _simpler(candidate)
    return case


def _simpler(case: Case) -> Iterator[Case]:
    """Neighbours that are simpler, the boldest steps first."""
    cuts, length = case.cuts, case.length
    if len(cuts) > 1:
        for cut in cuts[:8]:
            yield replace(case, cuts=(cut,))
        for half in (cuts[: len(cuts) // 2], cuts[len(cuts) // 2 :]):
            yield replace(case, cuts=half)
    last = cuts[-1] if cuts else 1
    for shorter in sorted({8, length // 4, length // 2, last + 1, length - 8, length - 1}):
        if max(2, last + 1) <= shorter < length:
            yield replace(case, length=shorter)
    if len(cuts) > 1:
        kept = [cut for cut in cuts if cut < length // 2]
        if kept and length // 2 > 1:
            yield replace(case, length=length // 2, cuts=tuple(kept))
    if 1 < len(cuts) <= 12:
        for cut in cuts:
            yield replace(case, cuts=tuple(other for other in cuts if other != cut))
    for place, cut in enumerate(cuts[:6]):
        before = cuts[place - 1] if place else 0
        for smaller in sorted({1, 2, cut // 2, cut - 1}):
            if before < smaller < cut:
                yield replace(case, cuts=(*cuts[:place], smaller, *cuts[place + 1 :]))
    if len(cuts) == 1 and cuts[0] > 1:  # all of it closer to the beginning
        for off in {cuts[0] // 2, 1} - {0}:
            yield replace(case, length=length - off, cuts=(cuts[0] - off,))
    for name, least in (("seed", 0), ("row", 0), ("rows", max(2, case.row + 1)), ("padding", 0), ("before", 1)):
        value = getattr(case, name)
        for smaller in sorted({least, (least + value) // 2, value - 1}):
            if least <= smaller < value:
                yield replace(case, **{name: smaller})
