"""Shares and rates: an interval covers as often as it says, of groups too, and when it is looked at after every answer."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pytest_lmeval.statistics import _proportion as proportion
from pytest_lmeval.statistics._proportion import wilson
from pytest_lmeval.statistics._sequential import confidence_sequence, verdict


def coverage(truth, samples):
    """The share of samples whose interval contains the truth; a sample is what `wilson` takes."""
    intervals = [wilson(*sample) for sample in samples]
    return np.mean([low <= truth <= high for low, high in intervals])


def independent(share, n, trials=2000):
    return ((row.tolist(),) for row in np.random.default_rng(0).random((trials, n)) < share)


def clustered(groups, size, trials=1500):
    """Groups whose own rates are drawn from Beta(2, 2): the truth is one half."""
    generator = np.random.default_rng(0)
    for _ in range(trials):
        rates = np.repeat(generator.beta(2, 2, groups), size)
        yield (generator.random(groups * size) < rates).tolist(), np.repeat(np.arange(groups), size).tolist()


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion" (Statistics in Medicine 17, 1998), table I
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right, n, low, high):
    assert wilson([1] * right + [0] * (n - right)) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("share", "n"), [(0.5, 30), (0.9, 50), (0.97, 200)])
def test_the_interval_of_independent_answers_covers_as_often_as_it_says(share, n):
    assert 0.93 <= coverage(share, independent(share, n)) <= 0.98


def test_a_normal_interval_would_cover_less_near_one():
    def normal(right):
        share, n = np.mean(right), len(right)
        return share, 1.96 * math.sqrt(share * (1 - share) / n)

    covered = [abs(share - 0.97) <= reach for share, reach in (normal(*sample) for sample in independent(0.97, 50))]
    assert np.mean(covered) < 0.85


@pytest.mark.parametrize(("groups", "size"), [(8, 20), (20, 5), (50, 10)])
def test_the_interval_of_groups_covers_as_often_as_it_says(groups, size):
    assert 0.93 <= coverage(0.5, clustered(groups, size)) <= 0.98


def test_treating_answers_of_groups_as_independent_would_cover_far_less():
    assert coverage(0.5, ((right, None) for right, _ in clustered(50, 10))) < 0.8


def test_few_groups_would_cover_less_with_a_normal_quantile(monkeypatch):
    monkeypatch.setattr(proportion, "_student", lambda level, degrees: proportion._normal(level))
    assert coverage(0.5, clustered(8, 20)) < 0.93


@pytest.mark.parametrize("n", range(1, 60))
def test_rounding_leaves_no_share_outside(n):
    (none, low_end), (high_end, all_) = wilson([0] * n), wilson([1] * n)
    assert (none, all_) == (0, 1)
    assert low_end == pytest.approx(1 - high_end)


def test_groups_of_one_say_the_same_as_none():
    right = [1, 0, 1, 1, 0, 1, 1, 1, 0, 1]
    assert wilson(right, list(range(10))) == wilson(right)


@pytest.mark.parametrize("answer", [0, 1])
def test_where_all_answers_are_the_same_there_are_as_many_as_groups(answer):
    assert wilson([answer] * 60, [index % 20 for index in range(60)]) == wilson([answer] * 20)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11)), min_size=1, max_size=80), st.randoms(use_true_random=False))
def test_groups_widen_the_interval_and_their_order_and_names_change_nothing(answers, random):
    right, groups = zip(*answers, strict=True)
    interval = wilson(right, groups)
    if interval is None:
        assert len(set(groups)) < 8
        return
    alone = wilson(right)
    assert 0 <= interval[0] <= alone[0] <= np.mean(right) <= alone[1] <= interval[1] <= 1
    random.shuffle(answers)
    assert wilson([one for one, _ in answers], [f"passage {group}" for _, group in answers]) == pytest.approx(interval)


def test_no_interval_of_no_answers_or_of_few_groups():
    assert wilson([]) is None
    assert wilson([1, 0] * 20, [index % 7 for index in range(40)]) is None


def test_a_graded_answer_is_no_share():
    with pytest.raises(ValueError, match=r"0\.5 is neither right"):
        wilson([1, 0.5])
    with pytest.raises(ValueError, match="2 answers and 1 groups"):
        wilson([1, 0], ["a"])


def streams(rate, trials=2000, length=200):
    """Successes so far after each answer [trials, length]."""
    return np.cumsum(np.random.default_rng(0).random((trials, length)) < rate, axis=1).tolist()


def ever(decides, stream):
    """The first verdict of a stream that is looked at after every answer, and when."""
    return next(((found, n) for n, successes in enumerate(stream, 1) if (found := decides(successes, n))), (None, len(stream)))


def looks_at_wilson(successes, n, threshold):
    low, high = wilson([1] * successes + [0] * (n - successes))
    return "above" if low > threshold else "below" if high < threshold else None


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_a_rate_that_is_the_threshold_is_rarely_decided_however_often_one_looks(threshold):
    wrong = [ever(lambda s, n: verdict(s, n, threshold), stream)[0] is not None for stream in streams(threshold)]
    assert np.mean(wrong) <= 0.05


def test_looking_at_an_ordinary_interval_after_every_answer_is_wrong_far_more_often():
    wrong = [ever(lambda s, n: looks_at_wilson(s, n, 0.5), stream)[0] is not None for stream in streams(0.5, trials=200)]
    assert np.mean(wrong) > 0.25


@pytest.mark.parametrize(("rate", "found"), [(0.9, "above"), (0.1, "below")])
def test_a_rate_far_from_the_threshold_is_decided_after_few_answers(rate, found):
    verdicts, counts = zip(*(ever(lambda s, n: verdict(s, n, 0.5), stream) for stream in streams(rate)), strict=True)
    assert np.mean([one == found for one in verdicts]) > 0.99
    assert np.median(counts) <= 20


def test_the_sequence_holds_the_rate_at_all_times_at_once():
    bounds = {(s, n): confidence_sequence(s, n) for n in range(1, 101) for s in range(n + 1)}
    missed = [
        any(not bounds[s, n][0] <= 0.8 <= bounds[s, n][1] for n, s in enumerate(stream, 1))
        for stream in streams(0.8, trials=1000, length=100)
    ]
    assert np.mean(missed) <= 0.05


@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([0.01, 0.05, 0.3]))
def test_bounds_contain_the_share_and_a_verdict_is_a_threshold_outside_them(n, share, alpha):
    successes = round(share * n)
    low, high = confidence_sequence(successes, n, alpha)
    assert 0 <= low <= successes / n <= high <= 1
    for threshold, expected in ((low * 0.999, "above"), (low + (high - low) * 0.001, None), (1 - (1 - high) * 0.999, "below")):
        outside = threshold < low or threshold > high
        assert verdict(successes, n, threshold, alpha) == (expected if outside else None)


@given(st.integers(1, 1000), st.floats(0, 1))
def test_yes_and_no_are_treated_alike(n, share):
    successes = round(share * n)
    low, high = confidence_sequence(successes, n)
    assert confidence_sequence(n - successes, n) == pytest.approx((1 - high, 1 - low))


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0.01, 0.99))
def test_the_bet_is_fair(n, share, rate):
    """A martingale: what is expected of the next E, if the rate is true, is the present one."""
    from pytest_lmeval.statistics._sequential import _log_evidence

    successes = round(share * n)
    now, up, down = (_log_evidence(successes + s, n + m, rate) for s, m in ((0, 0), (1, 1), (0, 1)))
    assert rate * math.exp(up - now) + (1 - rate) * math.exp(down - now) == pytest.approx(1, rel=1e-9)


def test_seven_of_seven_are_more_than_half_and_six_of_six_may_not_be():
    assert verdict(6, 6, 0.5) is None  # E = 2^6 * 231 / 1024 = 14.4
    assert verdict(7, 7, 0.5) == "above"  # E = 2^7 * 429 / 2048 = 26.8; 20 are needed


def test_thresholds_of_zero_and_one_are_decided_by_a_single_answer():
    assert verdict(1, 1, 0.0) == "above"
    assert verdict(9, 10, 1.0) == "below"
    assert verdict(0, 50, 0.0) is verdict(50, 50, 1.0) is verdict(0, 0, 0.5) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 2, 0.5), "3 successes among 2"), ((1, 2, 1.5), "threshold is 1.5"), ((1, 2, 0.5, 0.0), "alpha is 0.0")],
)
def test_what_is_no_count_and_no_probability_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        verdict(*arguments)
