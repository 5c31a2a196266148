"""Simulate how often a gate raises a false alarm and how often it finds a loss, beside other ways to compare numbers.

    paired       this gate: McNemar's exact test or flipped signs, a loss beyond the margin, all at a level of 1 %
    strict       the same, but the loss must be significantly beyond the margin
    unpaired     both runs as if independent, one-sided, at the same level
    threshold    the number fell by more than the margin

A simulated pair of runs says of every question whether each run answered it right, of every document how many nats it cost.
"""

from statistics import NormalDist

import numpy as np
import pytest

from pytest_lmeval.records._value import Value
from pytest_lmeval.statistics._paired import mcnemar, paired_difference, sign_flip
from pytest_lmeval.statistics._verdict import LEVEL, judge_all

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

PAIRS = 200
MARGIN = 0.01
RULES = ("paired", "strict", "unpaired", "threshold")
SAME = {  # no change: as many won as lost
    "no answer changes": {"n": 200, "lost": 0.0, "won": 0.0},
    "2 % of 200 change": {"n": 200, "lost": 0.01, "won": 0.01},
    "10 % of 200 change": {"n": 200, "lost": 0.05, "won": 0.05},
    "6 % of 1,000 change": {"n": 1000, "lost": 0.03, "won": 0.03},
    "6 % of 1,000, in groups of 10": {"n": 1000, "lost": 0.03, "won": 0.03, "group": 10},
}
LOST = {
    "200: 8 % lost, 2 % won": {"n": 200, "lost": 0.08, "won": 0.02},
    "200: 5 % lost, none won": {"n": 200, "lost": 0.05, "won": 0.0},
    "1,000: 3 % lost, 1 % won": {"n": 1000, "lost": 0.03, "won": 0.01},
    "1,000: 6 % lost, 3 % won": {"n": 1000, "lost": 0.06, "won": 0.03},
    "1,000: 6 % lost, 3 % won, in groups of 10": {"n": 1000, "lost": 0.06, "won": 0.03, "group": 10},
}
WITHIN = {  # a loss of half the margin: allowed
    "1,000: 2 % lost, 1.5 % won": {"n": 1000, "lost": 0.02, "won": 0.015},
    "5,000: 1 % lost, 0.5 % won": {"n": 5000, "lost": 0.01, "won": 0.005},
}


def answers(generator, *, n, lost, won, group=1, right=0.6):
    """Right answers before and after [n], and the groups, which change together."""
    base = np.repeat(generator.random(n // group) < right, group).astype(float)
    draws = np.repeat(generator.random(n // group), group)
    after = np.where(base == 1, draws >= lost / right, draws < won / (1 - right)).astype(float)
    return base, after, (np.arange(n) // group).tolist() if group > 1 else None


def alarms(base, new, groups, *, margin=MARGIN, weights=None, up=True):
    """rule -> whether it calls the second run worse."""
    found = paired_difference(base, new, weights, groups)
    (verdict,) = judge_all([found], [margin], [up])
    shifted = (new - base) + margin * (1 if up else -1) * (1 if weights is None else np.asarray(weights))
    sums = shifted if groups is None else np.bincount(groups, weights=shifted)
    n = len(base)
    scores = (base, new) if weights is None else (base / weights, new / weights)
    spread = np.hypot(scores[0].std(), scores[1].std()) / np.sqrt(n)
    loss = -found.value if up else found.value
    return {
        "paired": verdict.name == "worse",
        "strict": sign_flip(sums, "lower" if up else "higher") <= LEVEL,
        "unpaired": bool(spread) and loss / spread > NormalDist().inv_cdf(1 - LEVEL),
        "threshold": loss > margin,
    }


def rates(lmeval, title, draw, cases):
    """case -> rule -> fraction of pairs that it calls worse, recorded."""
    found = {}
    for seed, (name, case) in enumerate(cases.items()):
        generator = np.random.default_rng(seed)
        calls = [draw(generator, **case) for _ in range(PAIRS)]
        found[name] = {rule: Value(np.mean([call[rule] for call in calls]), n=PAIRS) for rule in RULES}
        lmeval.record("demo", f"{title}: {name}", **found[name])
    return found


def of_answers(generator, **case):
    return alarms(*answers(generator, **case))


def of_text(generator, *, documents, change, noise):
    """Nats of documents of 500 tokens, which differ much from one another and little between two runs."""
    tokens = generator.integers(100, 900, documents)
    base = tokens * generator.normal(3.0, 0.4, documents)
    new = base + tokens * generator.normal(change * 3.0, noise, documents)
    return alarms(base, new, None, margin=0.005 * 3.0, weights=tokens, up=False)


def test_without_a_change_about_one_pair_in_a_hundred_is_called_worse(lmeval):
    found = rates(lmeval, "no change", of_answers, SAME)
    assert all(of_rule["paired"] <= 0.02 for of_rule in found.values())
    assert max(of_rule["threshold"] for of_rule in found.values()) > 0.1


def test_a_loss_is_found_where_the_unpaired_test_finds_none(lmeval):
    found = rates(lmeval, "lost", of_answers, LOST)
    assert found["200: 8 % lost, 2 % won"]["paired"] > 0.5
    assert found["200: 8 % lost, 2 % won"]["unpaired"] < 0.05
    assert found["1,000: 3 % lost, 1 % won"]["paired"] > 0.7


def test_a_loss_within_the_margin_mostly_passes(lmeval):
    found = rates(lmeval, "half the margin lost", of_answers, WITHIN)
    assert all(of_rule["paired"] <= 0.1 for of_rule in found.values())


def test_a_loss_of_one_percent_on_text_is_found(lmeval):
    cases = {
        f"{documents} documents, {100 * change:g} % more": {"documents": documents, "change": change, "noise": 0.05}
        for change in (0.0, 0.0025, 0.01, 0.02)
        for documents in (50, 200)
    }
    found = rates(lmeval, "text", of_text, cases)
    most = LEVEL + 2.33 * (LEVEL / PAIRS) ** 0.5  # of a rate of 1 %, with a probability of 99 %
    assert all(found[f"{documents} documents, 0 % more"]["paired"] <= most for documents in (50, 200))
    assert found["50 documents, 1 % more"]["paired"] > 0.7
    assert found["200 documents, 2 % more"]["unpaired"] < 0.5


def test_a_run_of_many_metrics_has_no_more_false_alarms_than_one(lmeval):
    """Twenty gated metrics in a run, none changed: the fraction of runs with any alarm."""
    generator, runs = np.random.default_rng(0), {"Holm": 0, "each_by_itself": 0}
    for _ in range(PAIRS):
        changed = [answers(generator, n=300, lost=0.05, won=0.05)[:2] for _ in range(20)]
        counts = [(int((new < base).sum()), int((new > base).sum())) for base, new in changed]
        if min(mcnemar(*count, "lower") for count in counts) >= LEVEL:
            continue
        found = [paired_difference(*pair) for pair in changed]
        runs["Holm"] += "worse" in [one.name for one in judge_all(found, [MARGIN] * 20, [True] * 20, family=20)]
        runs["each_by_itself"] += "worse" in [judge_all([one], [MARGIN], [True])[0].name for one in found]
    lmeval.record("demo", "20 metrics that did not change", **{name: Value(n / PAIRS, n=PAIRS) for name, n in runs.items()})
    assert runs["Holm"] <= 0.02 * PAIRS
