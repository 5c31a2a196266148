"""One metric of two runs, example by example: the examples that both have, and what became of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pytest_lmeval.gates._scores import Scores, rounded
from pytest_lmeval.records._comparison import Flip
from pytest_lmeval.records._metric import metric
from pytest_lmeval.statistics._paired import Difference, paired_difference

LISTED = 20  # examples that changed, of which a record names so many


@dataclass(frozen=True)
class Both:
    """An example that both runs have: what it counts in each, what the sums are divided by, and what it shares with others."""

    id: str
    base: float
    new: float
    weight: float
    group: object


@dataclass(frozen=True)
class Paired:
    """base, new    the metric on the examples that both runs have
    difference   of a perplexity, that of its logarithm
    only_base, only_new   examples of one run alone
    lost, won, flipped    examples that changed (see `Comparison`); None where documents are compared, which all change
    """

    base: float
    new: float
    difference: Difference
    only_base: int = 0
    only_new: int = 0
    lost: int | None = None
    won: int | None = None
    flipped: tuple[Flip, ...] = ()


def pair(name: str, base: Scores, new: Scores, *, up: bool, level: float = 0.01) -> Paired | None:
    """A metric on the examples that both runs have; None where there are none, or what they are divided by is not the same.

    up     whether higher is better
    level  see `paired_difference`
    """
    common = _common(name, base, new)
    if not common or not (weight := math.fsum(one.weight for one in common)):
        return None
    declared, sides = metric(name), ([one.base for one in common], [one.new for one in common])
    weights, groups = [one.weight for one in common], [one.group for one in common]
    found = paired_difference(*sides, weights, groups, level=level)
    low, high, error = (None if one is None else declared.scale * one for one in (found.low, found.high, found.error))
    scaled = replace(found, value=declared.scale * found.value, low=low, high=high, error=error)
    before, after = (declared.scaled(math.fsum(side) / weight) for side in sides)
    only_base, only_new = (_counted(name, side) - len(common) for side in (base, new))
    paired = Paired(before, after, scaled, only_base, only_new)
    return _with_flips(paired, common, new, up=up) if name in new.columns else paired


def _counted(name: str, side: Scores) -> int:
    """How many examples the metric is about."""
    return sum(part is not None for part in side.ratio(name) or ())


def _common(name: str, base: Scores, new: Scores) -> list[Both] | None:
    """None where the same text was cut into other tokens, or the metric is no ratio."""
    if (old := base.ratio(name)) is None or (now := new.ratio(name)) is None:
        return None
    before, found = dict(zip(base.ids, old, strict=True)), []
    for example, is_now, group in zip(new.ids, now, new.groups, strict=True):
        if (was := before.get(example)) is None or is_now is None:
            continue
        if was[1] != is_now[1]:
            return None
        found.append(Both(example, was[0], is_now[0], was[1], (example,) if group is None else group))
    return found


def _with_flips(paired: Paired, common: list[Both], new: Scores, *, up: bool) -> Paired:
    """With the examples that changed, those that lost most first."""
    changed = [((one.new - one.base) * (1 if up else -1), one.id, one) for one in common if one.new != one.base]
    changed.sort(key=lambda found: found[:2])
    flips = []
    for _, name, one in changed[:LISTED]:
        output, target = new.said.get(name, (None, None))
        flips.append(Flip(id=name, before=rounded(one.base), after=rounded(one.new), output=output, target=target))
    lost = sum(gain < 0 for gain, *_ in changed)
    return replace(paired, lost=lost, won=len(changed) - lost, flipped=tuple(flips))
