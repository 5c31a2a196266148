"""Paired tests keep their level and find what unpaired ones miss; the verdicts of a gate follow from them."""

import math
from dataclasses import replace
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from pytest_lmeval.statistics import _paired
from pytest_lmeval.statistics._paired import Difference, detectable, holm, mcnemar, paired_difference, sign_flip
from pytest_lmeval.statistics._verdict import LEVEL, judge_all, judge_exact

SMALL = st.integers(0, 6)
GRADES = st.lists(st.tuples(st.floats(0, 4), st.floats(0, 4)), min_size=8, max_size=12)


def judge(found, margin=0.01, *, up=True, family=None):
    (verdict,) = judge_all([found], [margin], [up], family=family)
    return verdict


def difference(value, reach, p, error=None):
    """A difference over 50 examples with the interval value +- reach."""
    return Difference(value, value - reach, value + reach, p, 1 - p, error, 50, 50, 5, "")


@given(SMALL, SMALL)
def test_sign_flips_of_right_and_wrong_equal_mcnemars_test(lost, won):
    for alternative in ("lower", "higher"):
        assert sign_flip([-1] * lost + [1] * won, alternative) == pytest.approx(mcnemar(lost, won, alternative))


@given(st.integers(0, 500), st.integers(0, 500))
def test_mcnemars_test_is_a_binomial_tail(lost, won):
    assert mcnemar(lost, won, "lower") == mcnemar(won, lost, "higher")
    both = mcnemar(lost, won, "lower") + mcnemar(won, lost, "lower")
    assert both == pytest.approx(1 + math.comb(lost + won, lost) / 2 ** (lost + won))  # both tails contain what was seen


def test_drawn_signs_approximate_all_of_them():
    differences = np.random.default_rng(0).normal(-0.5, 1.0, 13)
    drawn = sign_flip([*differences, 1e-12], "lower")  # a fourteenth unit, without weight
    assert drawn == pytest.approx(sign_flip(differences, "lower"), rel=0.2)


def test_sums_that_differ_only_by_rounding_are_equally_extreme():
    assert sign_flip([-0.1, -0.2, -0.3, 0.1, 0.2, 0.3], "lower") > 0.5


@pytest.mark.parametrize("grouped", [True, False])
def test_examples_of_one_document_must_be_one_unit(grouped):
    """Taken for independent, a change of nothing would look like a loss far too often."""
    generator, alarms, n = np.random.default_rng(1), 0, 100
    document = np.arange(n) // 10
    for _ in range(60):
        luck = generator.normal(size=n // 10)[document] + 0.3 * generator.normal(size=n)
        found = paired_difference(np.zeros(n), luck, groups=document.tolist() if grouped else None)
        alarms += found.p_lower <= 0.05
    assert alarms <= 6 if grouped else alarms > 12


@given(GRADES, st.randoms())
def test_the_order_and_names_of_groups_do_not_matter(grades, random):
    groups = [f"g{index % 4}" for index in range(len(grades))]
    order = list(range(len(grades)))
    random.shuffle(order)
    one = paired_difference(*zip(*grades, strict=True), groups=groups)
    shuffled = zip(*(grades[index] for index in order), strict=True)
    other = paired_difference(*shuffled, groups=[groups[index] + "!" for index in order])
    assert one.value == pytest.approx(other.value, abs=1e-12)
    assert one.p_lower == pytest.approx(other.p_lower)
    assert (one.units, one.examples, one.changed) == (other.units, other.examples, other.changed)


@given(GRADES)
def test_losses_in_the_other_direction_are_gains(grades):
    base, new = zip(*grades, strict=True)
    there, back = paired_difference(base, new), paired_difference(new, base)
    assert there.value == pytest.approx(-back.value, abs=1e-12)
    assert there.p_lower == pytest.approx(back.p_higher)


@pytest.mark.parametrize(("lost", "won"), [(9, 1), (30, 12), (3, 3)])
def test_a_tie_that_changed_weighs_its_share_and_takes_sign_flips(lost, won):
    """A right answer that became a tie of two lost half; where all changes weigh the same, sign flips say what McNemar's test
    does, and Student's t may only find less."""
    base, new = [1.0] * lost + [0.5] * won + [1.0, 0.0, 0.5] * 10, [0.5] * lost + [1.0] * won + [1.0, 0.0, 0.5] * 10
    found = paired_difference(base, new)
    both = "a sign-flip permutation test and Student's t of skewed changes"
    assert (found.test, found.changed) == (both, lost + won)
    assert found.value == pytest.approx((won - lost) / 2 / len(base))
    change = np.array(new) - np.array(base)
    assert sign_flip(change, "lower") == pytest.approx(mcnemar(lost, won, "lower"), rel=0.25)
    assert found.p_lower >= sign_flip(change, "lower")
    whole = paired_difference([1.0] * lost + [0.0] * won, [0.0] * lost + [1.0] * won)
    assert whole.test == "McNemar's exact test"
    mixed = paired_difference([1.0] * (lost + 1) + [0.5] * won, [0.0] + [0.5] * lost + [1.0] * won)
    assert mixed.test == both


def test_adding_up_many_units_in_groups_loses_nothing():
    generator = np.random.default_rng(2)
    base = generator.normal(size=5000)
    change = generator.normal(-0.05, 1, 5000)
    found = paired_difference(base, base + change)
    assert found.units == 5000
    assert found.value == pytest.approx(change.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.error, rel=0.1)
    normal = change.mean() / (change.std() / math.sqrt(5000))
    assert found.p_lower == pytest.approx(NormalDist().cdf(normal), rel=0.3)


def test_weights_make_a_ratio_of_sums():
    found = paired_difference([10.0, 30.0] * 4, [11.0, 33.0] * 4, [10, 20] * 4)
    assert found.value == pytest.approx(4 * 4 / 120)
    assert found.test == "Student's t of skewed changes"


def test_examples_without_a_partner_and_negative_margins_are_refused():
    for base, new in (([], []), ([1.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="each example that is compared has both"):
            paired_difference(base, new)
    with pytest.raises(ValueError, match=r"the margin is -0\.1; it must be 0 or more"):
        judge(paired_difference([1, 0], [1, 0]), -0.1)


def test_intervals_without_examples_are_less_certain():
    generator, reach = np.random.default_rng(3), 1.96 * 0.49 / 20
    right, luck = generator.random(400) < 0.6, generator.random(400)
    base, new = right.astype(float), np.where(right, luck >= 0.08 / 0.6, luck < 0.02 / 0.4).astype(float)
    paired = paired_difference(base, new)
    unpaired = _paired.unpaired_difference(*((mean, mean - reach, mean + reach) for mean in (base.mean(), new.mean())), 400)
    assert unpaired.value == pytest.approx(paired.value)
    assert unpaired.error > 1.5 * paired.error
    assert unpaired.p_lower > 10 * paired.p_lower
    assert _paired.unpaired_difference((0.5, None, None), (0.1, 0.0, 0.2), 10).p_lower == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.data())
def test_holm_lies_between_no_adjustment_and_bonferroni_and_more_p_values_only_reject_more(values, data):
    adjusted = holm(values)
    assert all(value <= one <= min(1, len(values) * value) for value, one in zip(values, adjusted, strict=True))
    known = data.draw(st.integers(1, len(values)))
    assert all(early >= late for early, late in zip(holm(values[:known], family=len(values)), adjusted, strict=False))


@pytest.mark.parametrize("together", [True, False])
def test_judged_together_many_unchanged_metrics_are_hardly_ever_worse(together):
    generator = np.random.default_rng(4)
    runs = [[Difference(-1, -2, 0, p, 1 - p, 0.5, 99, 99, 99, "") for p in generator.random(20)] for _ in range(300)]

    def names(run):
        found = judge_all(run, [0.0] * 20, [True] * 20) if together else [judge(one, 0.0) for one in run]
        return {verdict.name for verdict in found}

    alarms = sum("worse" in names(run) for run in runs)
    assert alarms <= 8 if together else alarms > 30  # 1 % of 300 and three standard deviations; else 18 %


def test_a_verdict_takes_chance_and_margin_into_account():
    assert judge(paired_difference([1, 0, 1] * 9, [1, 0, 1] * 9)).name == "identical"
    lost = judge(paired_difference([1] * 50 + [0] * 50, [0] * 16 + [1] * 34 + [1] * 2 + [0] * 48))
    assert (lost.name, lost.p) == ("worse", mcnemar(16, 2, "lower"))
    base = np.random.default_rng(0).normal(size=300)
    significant = paired_difference(base, base - 0.001)
    assert significant.p_lower < 1e-4
    assert [judge(significant, margin).name for margin in (0.01, 0.0)] == ["same", "worse"]


def test_too_few_examples_are_unclear_and_the_verdict_says_how_many_are_needed():
    found = paired_difference([1] * 60 + [0] * 40, [0] * 4 + [1] * 56 + [1] * 2 + [0] * 38)
    verdict = judge(found, 0.01)
    assert verdict.name == "unclear"
    assert verdict.detectable == detectable(found.error, level=LEVEL, margin=0.01)
    assert verdict.needed == _paired.examples_needed(100, found.error, 0.01)


@cache
def noise(n):
    """Pairs of runs that change by a normal of standard deviation 1 per example; a loss shifts them."""
    return np.random.default_rng(5).normal(0.0, 1.0, (40, n))


def frequency(name, loss, *, n, margin=0.0):
    """How often n examples get this verdict."""
    found = [judge(paired_difference(np.zeros(n), change - loss), margin).name for change in noise(n)]
    return np.mean([one == name for one in found])


@pytest.mark.parametrize("margin", [0.0, 0.4, pytest.param(0.1, marks=pytest.mark.thorough)])
def test_a_detectable_loss_is_found_four_times_in_five(margin):
    smallest = detectable(60**-0.5, level=LEVEL, margin=margin)
    assert 0.65 <= frequency("worse", smallest, n=60, margin=margin) <= 0.95


def test_a_loss_that_is_detectable_without_a_margin_is_hardly_found_with_one():
    assert frequency("worse", detectable(60**-0.5, level=LEVEL), n=60, margin=0.7) < 0.1


def test_the_needed_number_of_examples_shows_four_times_in_five_that_nothing_was_lost():
    needed = judge(paired_difference(np.zeros(100), np.random.default_rng(6).normal(-0.2, 1.0, 100)), 0.2).needed
    assert 100 < needed < 400
    assert 0.65 <= frequency("same", 0.0, n=needed, margin=0.2) <= 0.95
    assert frequency("same", 0.0, n=needed // 4, margin=0.2) < 0.5


@pytest.mark.parametrize(
    ("groups", "family", "fewest"), [(6, 1, 8), (7, 1, 8), (8, 1, None), (10, 12, 11), (11, 12, None), (20, 1100, None)]
)
def test_the_verdict_says_how_many_groups_a_total_loss_needs_to_be_worse(groups, family, fewest):
    n = 5 * groups
    found = paired_difference(np.ones(n), np.zeros(n), groups=(np.arange(n) % groups).tolist(), level=LEVEL / family)
    verdict = judge(found, family=family)
    assert (verdict.name, verdict.fewest) == ("worse" if fewest is None else "unclear", fewest)
    uncertain = replace(found, error=0.1)
    assert (judge(uncertain, family=family).detectable is None) == (fewest is not None)


def test_the_usual_number_of_signs_is_too_small_for_many_metrics():
    found = paired_difference(np.ones(60), np.zeros(60), groups=list(range(30)) * 2)
    assert found.smallest_p == found.p_lower > LEVEL / 1100
    assert judge(found, family=1100).name == "unclear"


@given(st.floats(-1, 1), st.floats(0, 0.5), st.floats(1e-6, 1), st.floats(0, 0.3), st.floats(0, 0.3))
def test_a_larger_margin_never_makes_a_verdict_worse(value, reach, p, margin, more):
    found, rank = difference(value, reach, p, error=reach or None), ["worse", "unclear", "same"]
    small, large = (judge(found, size).name for size in (margin, margin + more))
    assume("better" not in (small, large))
    assert rank.index(large) >= rank.index(small)


@given(st.floats(-1, 1), st.floats(0, 0.5), st.floats(1e-6, 1), st.floats(0, 0.3))
def test_for_losses_lower_is_better(value, reach, p, margin):
    up, down = difference(value, reach, p), replace(difference(-value, reach, p), p_lower=1 - p, p_higher=p)
    assert judge(up, margin).name == judge(down, margin, up=False).name


def test_numbers_without_chance_are_compared_exactly():
    assert judge_exact(100, 100, 0, higher_is_better=False) == "identical"
    assert judge_exact(100, 101, 0, higher_is_better=False) == "worse"
    assert judge_exact(100, 99, 0, higher_is_better=False) == "better"
    assert judge_exact(0.5, 0.4, 0.2, higher_is_better=True) == "same"
