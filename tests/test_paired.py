"""Paired tests keep their level, find what unpaired ones miss, and the verdicts of a gate follow from them."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from pytest_lmeval.statistics._paired import (
    Difference,
    detectable,
    examples_needed,
    holm,
    mcnemar,
    paired_difference,
    sign_flip,
    unpaired_difference,
)
from pytest_lmeval.statistics._verdict import LEVEL, judge_all, judge_exact

SMALL = st.integers(0, 6)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)
GRADES = st.lists(st.tuples(st.floats(0, 4), st.floats(0, 4)), min_size=8, max_size=12)


def judge(found, margin=0.01, *, up=True, family=None):
    (verdict,) = judge_all([found], [margin], [up], family=family)
    return verdict


def answers(generator, n, *, lost, won, right=0.6):
    """Right and wrong answers before and after, of which shares are lost and won."""
    base = generator.random(n) < right
    luck = generator.random(n)
    return base.astype(float), np.where(base, luck >= lost / right, luck < won / (1 - right)).astype(float)


# ------------------------------------------------------------------------------------------- tests


@given(SMALL, SMALL)
def test_flipping_the_signs_of_right_and_wrong_is_the_test_of_mcnemar(lost, won):
    differences = [-1] * lost + [1] * won
    for alternative in ("lower", "higher", "different"):
        assert sign_flip(differences, alternative) == pytest.approx(mcnemar(lost, won, alternative))


@given(st.integers(0, 500), st.integers(0, 500))
def test_mcnemar_is_a_tail_of_the_binomial(lost, won):
    assert mcnemar(lost, won, "lower") == mcnemar(won, lost, "higher")
    assert mcnemar(lost, won) == mcnemar(won, lost)
    both = mcnemar(lost, won, "lower") + mcnemar(won, lost, "lower")
    assert both == pytest.approx(1 + math.comb(lost + won, lost) / 2 ** (lost + won))  # what was seen is in both tails


def test_drawn_signs_come_close_to_all_of_them():
    differences = np.random.default_rng(0).normal(-0.5, 1.0, 13)
    every = sign_flip(differences, "lower")
    drawn = sign_flip(np.concatenate([differences, np.full(1, 1e-12)]), "lower")  # a fourteenth that weighs nothing
    assert drawn == pytest.approx(every, rel=0.2)


def test_a_sum_that_only_rounding_tells_apart_is_as_extreme():
    assert sign_flip([-0.1, -0.2, -0.3, 0.1, 0.2, 0.3], "lower") > 0.5


def alarms(n, *, groups=None, level=0.05, trials=100):
    """How often a document whose examples share their luck makes a change of nothing look like a loss."""
    generator, found = np.random.default_rng(1), 0
    of = np.arange(n) // 10
    for trial in range(trials):
        luck = generator.normal(size=n // 10)[of] + 0.3 * generator.normal(size=n)
        difference = paired_difference(np.zeros(n), luck, groups=None if groups is None else of.tolist(), seed=trial)
        found += difference.p_lower <= level
    return found / trials


def test_examples_that_share_a_document_are_one_unit():
    assert alarms(200, groups="documents") <= 0.1


def test_taken_for_independent_they_would_alarm_far_too_often():
    assert alarms(200) > 0.2


@given(GRADES, st.randoms())
def test_neither_order_nor_names_of_groups_matter(grades, random):
    groups = [f"g{place % 4}" for place in range(len(grades))]
    order = list(range(len(grades)))
    random.shuffle(order)
    one = paired_difference(*zip(*grades, strict=True), groups=groups)
    other = paired_difference(
        *zip(*(grades[place] for place in order), strict=True), groups=[groups[place] + "!" for place in order]
    )
    assert one.value == pytest.approx(other.value, abs=1e-12)
    assert one.p_lower == pytest.approx(other.p_lower)
    assert (one.units, one.examples, one.changed) == (other.units, other.examples, other.changed)


@given(GRADES)
def test_the_other_way_round_losses_are_gains(grades):
    base, new = zip(*grades, strict=True)
    there, back = paired_difference(base, new), paired_difference(new, base)
    assert there.value == pytest.approx(-back.value, abs=1e-12)
    assert there.p_lower == pytest.approx(back.p_higher)


def test_many_units_are_added_up_in_groups_and_nothing_is_lost():
    generator = np.random.default_rng(2)
    base = generator.normal(size=5000)
    change = generator.normal(-0.05, 1, 5000)
    found = paired_difference(base, base + change)
    normal = change.mean() / (change.std() / math.sqrt(5000))
    assert found.units == 5000
    assert found.value == pytest.approx(change.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.error, rel=0.1)
    assert found.p_lower == pytest.approx(NormalDist().cdf(normal), rel=0.3)


def test_weights_make_it_a_ratio_of_sums():
    found = paired_difference([10.0, 30.0] * 4, [11.0, 33.0] * 4, [10, 20] * 4)
    assert found.value == pytest.approx(4 * 4 / 120)
    assert found.test == "a sign-flip permutation test"


@pytest.mark.parametrize(("base", "new"), [([], []), ([1.0], [1.0, 0.0])])
def test_examples_without_a_partner_are_refused(base, new):
    with pytest.raises(ValueError, match="each example that is compared has both"):
        paired_difference(base, new)


def test_without_examples_the_intervals_are_compared_and_are_less_certain():
    generator = np.random.default_rng(3)
    base, new = answers(generator, 400, lost=0.08, won=0.02)
    paired = paired_difference(base, new)
    reach = 1.96 * 0.49 / 20
    unpaired = unpaired_difference(
        (base.mean(), base.mean() - reach, base.mean() + reach), (new.mean(), new.mean() - reach, new.mean() + reach), 400
    )
    assert unpaired.value == pytest.approx(paired.value)
    assert unpaired.error > 1.5 * paired.error
    assert unpaired.p_lower > 10 * paired.p_lower
    assert unpaired_difference((0.5, None, None), (0.1, 0.0, 0.2), 10).p_lower == 1


# -------------------------------------------------------------------------------------- many at once


@given(P_VALUES)
def test_holm_lies_between_nothing_and_bonferroni(values):
    for value, adjusted in zip(values, holm(values), strict=True):
        assert value <= adjusted <= min(1, len(values) * value)


@given(P_VALUES, st.data())
def test_what_is_rejected_before_all_are_known_is_rejected_afterwards(values, data):
    known = data.draw(st.integers(1, len(values)))
    early, late = holm(values[:known], family=len(values)), holm(values)
    assert all(now >= then for now, then in zip(early, late, strict=False))


def test_among_many_that_did_not_change_hardly_one_is_called_worse():
    generator = np.random.default_rng(4)

    def any_worse(family):
        found = [Difference(-1, -2, 0, p, 1 - p, 0.5, 99, 99, 99, "") for p in generator.random(20)]
        verdicts = judge_all(found, [0.0] * 20, [True] * 20, family=family)
        return any(verdict.name == "worse" for verdict in verdicts)

    assert sum(any_worse(20) for _ in range(1000)) <= 25  # 1 % of 1000, and three standard deviations


def test_without_holm_there_would_be_many():
    generator = np.random.default_rng(4)
    alone = [Difference(-1, -2, 0, p, 1 - p, 0.5, 99, 99, 99, "") for p in generator.random(20_000)]
    worse = np.reshape([judge(found, 0.0).name == "worse" for found in alone], (1000, 20)).any(axis=1)
    assert worse.sum() > 100


# ------------------------------------------------------------------------------------------ verdicts


def test_identical_runs_are_identical():
    assert judge(paired_difference([1, 0, 1] * 9, [1, 0, 1] * 9)).name == "identical"


def test_a_loss_that_chance_does_not_explain_is_worse():
    lost = judge(paired_difference([1] * 50 + [0] * 50, [0] * 16 + [1] * 34 + [1] * 2 + [0] * 48))
    assert lost.name == "worse"
    assert lost.p == mcnemar(16, 2, "lower")


def test_one_within_the_margin_is_the_same_however_significant():
    base = np.random.default_rng(0).normal(size=300)
    found = paired_difference(base, base - 0.001)
    assert found.p_lower < 1e-4
    assert judge(found, 0.01).name == "same"
    assert judge(found, 0.0).name == "worse"


def test_too_few_examples_are_unclear_and_it_is_said_how_many_would_do():
    found = paired_difference([1] * 60 + [0] * 40, [0] * 4 + [1] * 56 + [1] * 2 + [0] * 38)
    verdict = judge(found, 0.01)
    assert verdict.name == "unclear"
    assert verdict.detectable == detectable(found.error, level=LEVEL, margin=0.01)
    assert verdict.needed == examples_needed(100, found.error, 0.01)


def share(name, loss, *, n, margin=0.0, trials=60, family=1):
    """How often n examples, each of which changes by its own luck (standard deviation 1), are given this verdict."""
    generator = np.random.default_rng(5)
    pairs = [paired_difference(np.zeros(n), generator.normal(-loss, 1.0, n)) for _ in range(trials)]
    return np.mean([judge(found, margin, family=family).name == name for found in pairs])


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.4])
def test_what_is_called_detectable_is_found_four_times_in_five(margin):
    n = 200
    smallest = detectable(n**-0.5, level=LEVEL, margin=margin)
    assert 0.65 <= share("worse", smallest, n=n, margin=margin) <= 0.95


def test_without_its_margin_what_is_called_detectable_would_hardly_be_found():
    assert share("worse", detectable(200**-0.5, level=LEVEL), n=200, margin=0.4) < 0.1


def test_as_many_examples_as_are_called_needed_show_four_times_in_five_that_nothing_was_lost():
    needed = judge(paired_difference(np.zeros(100), np.random.default_rng(6).normal(-0.2, 1.0, 100)), 0.2).needed
    assert 100 < needed < 400
    assert 0.65 <= share("same", 0.0, n=needed, margin=0.2) <= 0.95
    assert share("same", 0.0, n=needed // 4, margin=0.2) < 0.5


@pytest.mark.parametrize(
    ("groups", "family", "fewest"), [(6, 1, 7), (7, 1, None), (10, 12, 11), (11, 12, None), (20, 1100, None)]
)
def test_where_not_even_a_loss_of_everything_would_be_worse_it_is_said_how_many_groups_it_takes(groups, family, fewest):
    n = 50 * groups
    found = paired_difference(np.ones(n), np.zeros(n), groups=(np.arange(n) % groups).tolist(), level=LEVEL / family)
    verdict = judge(found, family=family)
    assert (verdict.name, verdict.fewest) == ("worse" if fewest is None else "unclear", fewest)
    swaying = replace(found, error=0.1)
    assert (judge(swaying, family=family).detectable is None) == (fewest is not None)


def test_with_the_usual_number_of_signs_a_run_of_many_metrics_would_find_nothing():
    found = paired_difference(np.ones(60), np.zeros(60), groups=list(range(30)) * 2)
    assert found.least == found.p_lower > LEVEL / 1100
    assert judge(found, family=1100).name == "unclear"


@given(st.floats(-1, 1), st.floats(0, 0.5), st.floats(1e-6, 1), st.floats(0, 0.3), st.floats(0, 0.3))
def test_a_larger_margin_never_makes_a_verdict_worse(value, reach, p, margin, more):
    found = Difference(value, value - reach, value + reach, p, 1 - p, reach or None, 50, 50, 5, "")
    rank = ["worse", "unclear", "same"]
    small, large = (judge(found, size).name for size in (margin, margin + more))
    assume("better" not in (small, large))
    assert rank.index(large) >= rank.index(small)


@given(st.floats(-1, 1), st.floats(0, 0.5), st.floats(1e-6, 1), st.floats(0, 0.3))
def test_of_losses_less_is_better(value, reach, p, margin):
    up = Difference(value, value - reach, value + reach, p, 1 - p, None, 50, 50, 5, "")
    down = Difference(-value, -value - reach, -value + reach, 1 - p, p, None, 50, 50, 5, "")
    assert judge(up, margin).name == judge(down, margin, up=False).name


def test_what_chance_has_no_part_in_is_compared_as_it_is():
    assert judge_exact(100, 100, 0, higher_is_better=False) == "identical"
    assert judge_exact(100, 101, 0, higher_is_better=False) == "worse"
    assert judge_exact(100, 99, 0, higher_is_better=False) == "better"
    assert judge_exact(0.5, 0.4, 0.2, higher_is_better=True) == "same"


def test_a_margin_below_nothing_is_refused():
    with pytest.raises(ValueError, match=r"the margin is -0\.1; what may be lost is 0 or more"):
        judge(paired_difference([1, 0], [1, 0]), -0.1)
