"""Pair the examples of two runs, and measure how a metric differs over those that both have."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from msgspec import structs

from pytest_lmeval.gates._scores import Scores, question_of, rounded
from pytest_lmeval.records._comparison import Comparison, Flip
from pytest_lmeval.records._metric import metric
from pytest_lmeval.statistics._drawn import drawn_difference
from pytest_lmeval.statistics._paired import Difference, paired_difference

LISTED = 20  # number of changed examples that a record lists

Found = tuple[Difference, float, Comparison]


class Pair(NamedTuple):
    """What one example, or all answers to one question, counts in both runs, and what it shares with others."""

    id: str
    base: float
    new: float
    group: Hashable


def pair(name: str, base: Scores, new: Scores, *, up: bool, drawn: bool = False, level: float = 0.01) -> Found | None:
    """A metric over the examples that both runs have: difference, value of the baseline, row without a verdict.

    up     whether higher is better
    drawn  questions have several answers, drawn anew in each run: all answers to a question are compared with all of the other
           run, in whatever numbers

    None if there are no such examples, or their denominators differ.
    """
    return (_by_question if drawn and name in new.columns else _by_example)(name, base, new, up, level)


def _by_example(name: str, base: Scores, new: Scores, up: bool, level: float) -> Found | None:
    if (old := base.ratio(name)) is None or (now := new.ratio(name)) is None:
        return None
    before = dict(zip(base.ids, old, strict=True))
    pairs, weights = [], []
    for example, is_now, group in zip(new.ids, now, new.groups, strict=True):
        if (was := before.get(example)) is None or is_now is None:
            continue
        if was[1] != is_now[1]:
            return None
        pairs.append(Pair(example, was[0], is_now[0], (example,) if group is None else group))
        weights.append(was[1])
    if not (weight := math.fsum(weights)):
        return None
    _, was_all, is_all, groups = zip(*pairs, strict=True)
    found = paired_difference(was_all, is_all, weights, groups, consecutive=new.consecutive, level=level)
    declared = metric(name)
    mean_base, mean_new = (declared.scaled(math.fsum(side) / weight) for side in (was_all, is_all))
    only_base, only_new = (sum(part is not None for part in side) - len(pairs) for side in (old, now))
    row = Comparison(verdict="unclear", base=rounded(mean_base), new=rounded(mean_new), only_base=only_base, only_new=only_new)
    return _scaled(found, declared.scale), mean_base, _with_flips(row, pairs, new, up) if name in new.columns else row


def _by_question(name: str, base: Scores, new: Scores, up: bool, level: float) -> Found | None:
    old, now = base.by_question(name), new.by_question(name)
    if not old or not now or not (common := [question for question in now if question in old]):
        return None
    shared = {question_of(example): group for example, group in zip(new.ids, new.groups, strict=True) if group is not None}
    groups = [shared.get(question, (question,)) for question in common]
    before, after = [old[question] for question in common], [now[question] for question in common]
    declared = metric(name)
    mean_base, mean_new = (declared.scaled(fmean(map(fmean, side))) for side in (before, after))
    row = Comparison(
        verdict="unclear",
        base=rounded(mean_base),
        new=rounded(mean_new),
        only_base=len(old) - len(common),
        only_new=len(now) - len(common),
        answers=[rounded(fmean(map(len, side))) for side in (before, after)],
    )
    means = zip(common, map(fmean, before), map(fmean, after), groups, strict=True)
    found = _scaled(drawn_difference(before, after, groups, level=level), declared.scale)
    return found, mean_base, _with_flips(row, [Pair(*one) for one in means], new, up)


def _scaled(found: Difference, scale: float) -> Difference:
    names = ("value", "low", "high", "error", "noise")
    return replace(found, **{name: scale * one for name in names if (one := getattr(found, name)) is not None})


def _with_flips(row: Comparison, pairs: Sequence[Pair], new: Scores, up: bool) -> Comparison:
    """The row with the examples that changed, the largest losses first. Documents, unlike answers, all change."""
    gains = (((one.new - one.base) * (1 if up else -1), one) for one in pairs)
    changed = sorted((gain, one.id, one.base, one.new) for gain, one in gains if gain)
    flips = []
    for _, example, was, now in changed[:LISTED]:
        output, target = new.texts.get(example, (None, None))
        flips.append(Flip(id=example, before=rounded(was), after=rounded(now), output=output, target=target))
    lost = sum(one[0] < 0 for one in changed)
    return structs.replace(row, lost=lost, won=len(changed) - lost, flipped=flips)
