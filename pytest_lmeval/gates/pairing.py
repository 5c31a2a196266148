"""One metric of two runs, example by example: the examples that both have, and what became of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from pytest_lmeval.gates.scores import LOGARITHMIC, Scores, rounded
from pytest_lmeval.statistics.paired import Difference, paired_difference

LISTED = 20  # examples that changed, of which a record names so many


@dataclass(frozen=True)
class Common:
    """What the examples that both runs have count in each, what the sums are divided by, and what they share with others."""

    ids: list[str]
    base: list[float]
    new: list[float]
    weights: list[float]
    groups: list[Any]


@dataclass(frozen=True)
class Paired:
    """base, new    the metric on the examples that both runs have
    difference   of a perplexity, that of its logarithm
    row          what the reader is told of the examples
    """

    base: float
    new: float
    difference: Difference
    row: dict[str, Any]


def pair(metric: str, base: Scores, new: Scores, *, up: bool, level: float = 0.01) -> Paired | None:
    """A metric on the examples that both runs have; None where there are none, or what they are divided by is not the same.

    up     whether higher is better
    level  see `paired_difference`
    """
    common = _common(metric, base, new)
    if common is None:
        return None
    found = paired_difference(common.base, common.new, common.weights, common.groups, level=level)
    factor = base.factor(metric)
    scaled = replace(
        found,
        value=factor * found.value,
        low=None if found.low is None else factor * found.low,
        high=None if found.high is None else factor * found.high,
        error=None if found.error is None else factor * found.error,
    )
    before, after = (factor * math.fsum(side) / math.fsum(common.weights) for side in (common.base, common.new))
    if metric in LOGARITHMIC:
        before, after = math.exp(before), math.exp(after)
    apart = {"only_base": len(base.ids) - len(common.ids), "only_new": len(new.ids) - len(common.ids)}
    return Paired(before, after, scaled, {**apart, **(_flips(common, new, up=up) if metric in new.columns else {})})


def _common(metric: str, base: Scores, new: Scores) -> Common | None:
    if (old := base.ratio(metric)) is None or (now := new.ratio(metric)) is None:
        return None
    places = {name: place for place, name in enumerate(base.ids)}
    found = Common([], [], [], [], [])
    for after, name in enumerate(new.ids):
        before = places.get(name)
        if before is None or (was := old[before]) is None or (is_now := now[after]) is None:
            continue
        if was[1] != is_now[1]:  # the same text, cut into other tokens
            return None
        found.ids.append(name)
        found.base.append(was[0])
        found.new.append(is_now[0])
        found.weights.append(was[1])
        found.groups.append((name,) if new.groups[after] is None else new.groups[after])
    return found if math.fsum(found.weights) else None


def _flips(common: Common, new: Scores, *, up: bool) -> dict[str, Any]:
    """Which examples changed, those that lost most first."""
    changed = sorted(
        ((now - old) * (1 if up else -1), name, old, now)
        for name, old, now in zip(common.ids, common.base, common.new, strict=True)
        if now != old
    )
    rows = []
    for _, name, old, now in changed[:LISTED]:
        answer, target = new.said.get(name, (None, None))
        rows.append({"id": name, "before": rounded(old), "after": rounded(now), "answer": answer, "target": target})
    lost = sum(gain < 0 for gain, *_ in changed)
    return {"lost": lost, "won": len(changed) - lost, "flipped": rows}
