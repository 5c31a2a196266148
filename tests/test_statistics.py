"""Intervals cover as often as they say and are withheld where they could not; a confidence sequence holds at every n."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pytest_lmeval.statistics._estimate import of_units, ratio_intervals
from pytest_lmeval.statistics._proportion import wilson
from pytest_lmeval.statistics._sequential import PRIOR, confidence_sequence, verdict
from pytest_lmeval.statistics._student import quantile


def test_student_quantiles_match_published_tables():
    assert [round(quantile(freedom), 3) for freedom in (1, 2, 5, 11, 120)] == [12.706, 4.303, 2.571, 2.201, 1.980]
    assert [round(quantile(freedom, 0.001), 3) for freedom in (5, 10)] == [5.893, 4.144]


# ------------------------------------------------------------------------------------------- estimates


def ratio_interval(numerators, denominators, **options):
    (interval,) = ratio_intervals(np.column_stack([numerators, denominators]), [(0, 1)], **options)
    return interval


def covers(draw, truth, trials, **options):
    """The fraction of draws, each numerators and denominators, whose interval contains the truth."""
    generator = np.random.default_rng(0)
    found = [ratio_interval(*draw(generator), **options) for _ in range(trials)]
    return np.mean([low <= truth <= high for low, high in found])


@pytest.mark.parametrize(("by_document", "trials", "least", "most"), [(True, 200, 0.91, 0.99), (False, 10, 0, 0.6)])
def test_the_interval_over_documents_covers_as_often_as_it_says_and_over_tokens_far_less(by_document, trials, least, most):
    def draw(generator):
        sizes, means = generator.integers(5, 50, 30), generator.normal(2.0, 0.5, 30)
        return (sizes * means, sizes) if by_document else (np.repeat(means, sizes), np.ones(sizes.sum()))

    assert least <= covers(draw, 2.0, trials) <= most


@pytest.mark.parametrize("documents", [8, 30])
def test_the_interval_covers_where_few_long_documents_have_most_tokens_and_are_easier(documents):
    """Where resampled documents gave 64 to 80 %."""

    def draw(generator):
        sizes = np.exp(generator.normal(5.3, 1.2, documents))
        return sizes * (generator.normal(4.0, 0.4, documents) - 0.25 * np.log(sizes)), sizes

    truth = 4.0 - 0.25 * (5.3 + 1.2**2)  # the mean of log sizes, weighted by the sizes
    assert covers(draw, truth, 300) >= 0.87


def slow(generator, blocks, *, share, length):
    """Sums over blocks: independent noise of variance 1, and an autoregression of variance `share` and correlation `length`."""
    noise, rho = generator.normal(size=blocks), math.exp(-1 / length)
    steps, change = generator.normal(0, math.sqrt(share * (1 - rho**2)), blocks), np.zeros(blocks)
    last = generator.normal(0, math.sqrt(share))
    for index, step in enumerate(steps):
        change[index] = last = rho * last + step
    return noise + change, np.ones(blocks)


@pytest.mark.parametrize(("consecutive", "least", "most"), [(True, 0.9, 1), (False, 0, 0.75)])
def test_the_interval_of_one_text_covers_where_it_changes_slowly_and_that_of_documents_does_not(consecutive, least, most):
    found = covers(lambda generator: slow(generator, 150, share=2, length=5), 0.0, 200, consecutive=consecutive)
    assert least <= found <= most


def test_the_interval_of_a_text_whose_blocks_are_independent_is_hardly_wider_than_theirs():
    sums = [np.column_stack(slow(np.random.default_rng(seed), 200, share=0, length=1)) for seed in range(50)]
    found = [ratio_intervals(one, [(0, 1)], consecutive=way)[0] for way in (True, False) for one in sums]
    widths = np.array([high - low for low, high in found]).reshape(2, -1).mean(axis=1)
    assert 1 < widths[0] / widths[1] < 1.35


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(1, 9)), min_size=30, max_size=40), st.booleans(), st.floats(0.1, 10))
def test_an_interval_holds_the_ratio_and_follows_its_scale(sums, consecutive, factor):
    above, below = np.array(sums).T
    low, high = ratio_interval(above, below, consecutive=consecutive)
    value = above.sum() / below.sum()
    assert low <= value + 1e-9
    assert high >= value - 1e-9
    scaled = ratio_interval(factor * above, below, consecutive=consecutive)
    assert scaled == pytest.approx((factor * low, factor * high), rel=1e-6, abs=1e-9)


def test_deviations_too_small_to_be_cubed_have_an_interval():
    low, high = ratio_interval(np.append(np.zeros(29), 1e-120), np.ones(30))
    assert low <= 1e-120 / 30 <= high < 1e-118


def test_the_interval_of_equal_units_that_are_not_skewed_is_that_of_the_textbook():
    values = np.concatenate([np.arange(1.0, 51.0), -np.arange(1.0, 51.0)])
    low, high = ratio_interval(values, np.ones(100))
    assert (low, high) == pytest.approx((-high, -low))
    assert high == pytest.approx(quantile(99) * values.std(ddof=1) / 10, rel=0.01)


@pytest.mark.parametrize(
    ("values", "divisors", "consecutive"),
    [
        (np.ones(7), np.ones(7), False),
        (np.ones(29), np.ones(29), True),
        (np.array([np.nan] * 30), np.ones(30), True),
        (np.array([np.nan] * 20), np.ones(20), False),
        (np.ones(8), np.array([1.0] + [0.0] * 7), False),
        (np.ones(30), np.zeros(30), True),
    ],
    ids=["few units", "few blocks", "blocks not finite", "not finite", "one unit with all tokens", "nothing to divide by"],
)
def test_sums_that_say_too_little_have_no_interval(values, divisors, consecutive):
    assert ratio_interval(values, divisors, consecutive=consecutive) is None


@pytest.mark.parametrize("side", [-1, 1])
def test_few_units_must_hold_with_one_more(side):
    """Ten documents that all changed alike are a change; ten of a skewed distribution whose mean is zero are hardly ever."""
    alike = of_units(np.column_stack([side * (1 + np.arange(10) / 50), np.ones(10)]), cautious=True)
    assert (alike.above if side > 0 else alike.below)(0.0) < 0.01
    generator, alarms = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(500):
        sums = np.column_stack([side * (1 - generator.exponential(1, 10)), np.ones(10)])
        for cautious in alarms:
            found = of_units(sums, cautious=cautious)
            alarms[cautious] += (found.above if side > 0 else found.below)(0.0) <= 0.01
    assert alarms[True] <= 5 < alarms[False]


# ------------------------------------------------------------------------------------------ proportions


def coverage(truth, samples):
    """The fraction of samples, each the arguments of `wilson`, whose interval contains the truth."""
    intervals = [wilson(*sample) for sample in samples]
    return np.mean([low <= truth <= high for low, high in intervals])


def independent(rate, n, trials=1000):
    return ((row.tolist(),) for row in np.random.default_rng(0).random((trials, n)) < rate)


def clustered(groups, size, trials=1000):
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
def test_wilson_matches_published_intervals(right, n, low, high):
    assert wilson([1] * right + [0] * (n - right)) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("rate", "n"), [(0.5, 30), (0.9, 50), (0.97, 200)])
def test_the_interval_of_independent_answers_covers_as_often_as_it_says(rate, n):
    assert 0.93 <= coverage(rate, independent(rate, n)) <= 0.98


# With 8 groups, a normal quantile instead of Student's covers less than 93 %.
@pytest.mark.parametrize(("groups", "size"), [(8, 20), (20, 5), pytest.param(50, 10, marks=pytest.mark.thorough)])
def test_the_interval_of_groups_covers_as_often_as_it_says(groups, size):
    assert 0.93 <= coverage(0.5, clustered(groups, size)) <= 0.98


def test_treating_answers_of_groups_as_independent_would_cover_far_less():
    assert coverage(0.5, ((right, None) for right, _ in clustered(50, 10, trials=200))) < 0.8


@pytest.mark.parametrize("n", [10, 100])
def test_the_interval_of_grades_covers_as_often_as_it_says_and_has_a_width_where_all_agree(n):
    generator, held = np.random.default_rng(0), 0
    for _ in range(500):
        low, high = wilson(np.where(generator.random(n) < 0.9, 1, generator.random(n)))
        held += low <= 0.95 <= high
    assert 0.92 <= held / 500 <= 0.99
    for grade in (0.0, 0.5, 1.0):
        low, high = wilson([grade] * n)
        assert high - low > 1 / (2 * n)


def test_rounding_excludes_neither_0_nor_1():
    for n in range(1, 60):
        (none, low_end), (high_end, every) = wilson([0] * n), wilson([1] * n)
        assert (none, every) == (0, 1)
        assert low_end == pytest.approx(1 - high_end)


def test_groups_of_one_change_nothing_and_equal_answers_count_as_one_per_group():
    right = [1, 0, 1, 1, 0, 1, 1, 1, 0, 1]
    assert wilson(right, list(range(10))) == wilson(right)
    for answer in (0, 1):
        assert wilson([answer] * 60, [index % 20 for index in range(60)]) == pytest.approx(wilson([answer] * 20))


@pytest.mark.parametrize(("n", "ties", "k"), [(30, 0.05, 2), (30, 0.3, 4), (100, 0.3, 2), (300, 0.02, 4), (100, 1.0, 2)])
def test_an_interval_with_ties_covers_the_expected_score(n, ties, k):
    """Ties count 1/k if a right choice is among them: a mean of numbers between 0 and 1."""
    generator, rate = np.random.default_rng(n), 0.7
    tied = generator.random((2000, n)) < ties
    answers = np.where(tied, 1 / k, generator.random((2000, n)) < rate)
    expected = (1 - ties) * rate + ties / k
    ends = np.array([wilson(some) for some in answers])
    assert ((ends[:, 0] <= expected) & (expected <= ends[:, 1])).mean() > 0.935
    assert (ends[:, 0] < ends[:, 1]).all()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11)), min_size=1, max_size=80), st.randoms(use_true_random=False))
def test_groups_widen_the_interval_whatever_their_order_and_names(answers, random):
    right, groups = zip(*answers, strict=True)
    interval = wilson(right, groups)
    if interval is None:
        assert len(set(groups)) < 8
        return
    alone = wilson(right)
    assert 0 <= interval[0] <= alone[0] <= np.mean(right) <= alone[1] <= interval[1] <= 1
    random.shuffle(answers)
    assert wilson([one for one, _ in answers], [f"passage {group}" for _, group in answers]) == pytest.approx(interval)


def test_no_answers_and_few_groups_have_no_interval_and_missing_groups_are_refused():
    assert wilson([]) is None
    assert wilson([1, 0] * 20, [index % 7 for index in range(40)]) is None
    for outside in (1.5, -0.5, math.nan):
        with pytest.raises(ValueError, match=f"{outside} does not lie between wrong"):
            wilson([1, outside])
    with pytest.raises(ValueError, match="2 answers and 1 groups"):
        wilson([1, 0], ["a"])


# ---------------------------------------------------------------------------------- confidence sequences


def streams(rate, trials=500, length=200):
    """Successes so far after each answer [trials, length]."""
    return np.cumsum(np.random.default_rng(0).random((trials, length)) < rate, axis=1).tolist()


def first_verdict(stream, threshold=0.5):
    """The first verdict on a stream that is checked after every answer, and its n."""
    verdicts = ((verdict(successes, n, threshold), n) for n, successes in enumerate(stream, 1))
    return next((found for found in verdicts if found[0]), (None, len(stream)))


@pytest.mark.parametrize("threshold", [0.5, pytest.param(0.9, marks=pytest.mark.thorough)])
def test_a_rate_equal_to_the_threshold_is_rarely_decided_however_often_it_is_checked(threshold):
    wrong = [first_verdict(stream, threshold)[0] is not None for stream in streams(threshold)]
    assert np.mean(wrong) <= 0.05


def test_checking_an_ordinary_interval_after_every_answer_is_wrong_far_more_often():
    def excluded(successes, n):
        low, high = wilson([1] * successes + [0] * (n - successes))
        return not low <= 0.5 <= high

    wrong = [any(excluded(successes, n) for n, successes in enumerate(stream, 1)) for stream in streams(0.5, trials=60)]
    assert np.mean(wrong) > 0.25


@pytest.mark.parametrize(("rate", "found"), [(0.9, "above"), (0.1, "below")])
def test_a_rate_far_from_the_threshold_is_decided_after_few_answers(rate, found):
    verdicts, counts = zip(*map(first_verdict, streams(rate)), strict=True)
    assert np.mean([one == found for one in verdicts]) > 0.99
    assert np.median(counts) <= 20


@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([0.01, 0.05, 0.3]))
def test_bounds_contain_the_observed_rate_and_verdicts_decide_the_thresholds_outside(n, rate, alpha):
    successes = round(rate * n)
    low, high = confidence_sequence(successes, n, alpha)
    assert 0 <= low <= successes / n <= high <= 1
    assert confidence_sequence(n - successes, n, alpha) == pytest.approx((1 - high, 1 - low))  # yes and no are treated alike
    for threshold, expected in ((low * 0.999, "above"), (low + (high - low) * 0.001, None), (1 - (1 - high) * 0.999, "below")):
        outside = threshold < low or threshold > high
        assert verdict(successes, n, threshold, alpha) == (expected if outside else None)


def log_beta(a, b):
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def evidence(successes, failures, rate):
    """E_n(rate), by its definition."""
    mixture = log_beta(successes + PRIOR, failures + PRIOR) - log_beta(PRIOR, PRIOR)
    return math.exp(mixture - successes * math.log(rate) - failures * math.log(1 - rate))


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.01, 0.99))
def test_the_evidence_is_a_martingale_and_decides_at_one_over_alpha(successes, failures, rate):
    """At the true rate, the expected next E is the present one."""
    now, n = evidence(successes, failures, rate), successes + failures
    ahead = rate * evidence(successes + 1, failures, rate) + (1 - rate) * evidence(successes, failures + 1, rate)
    assert ahead == pytest.approx(now, rel=1e-9)
    for factor, decided in ((1.001, True), (0.999, False)):
        if 0 < (alpha := factor / now) < 1:
            assert (verdict(successes, n, rate, alpha) is not None) == decided


def test_the_fewest_answers_that_decide():
    assert verdict(6, 6, 0.5) is None  # E = 2^6 * 231 / 1024 = 14.4
    assert verdict(7, 7, 0.5) == "above"  # E = 2^7 * 429 / 2048 = 26.8; 20 are needed
    assert verdict(1, 1, 0.0) == "above"
    assert verdict(9, 10, 1.0) == "below"
    assert verdict(0, 50, 0.0) is verdict(50, 50, 1.0) is verdict(0, 0, 0.5) is None
    assert confidence_sequence(0, 0) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 2, 0.5), "3 successes among 2"), ((1, 2, 1.5), "threshold is 1.5"), ((1, 2, 0.5, 0.0), "alpha is 0.0")],
)
def test_impossible_counts_and_probabilities_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        verdict(*arguments)
