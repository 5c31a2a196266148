"""Intervals cover what they claim to, and are withheld where they could not."""

import numpy as np
import pytest

from pytest_lmeval.statistics._bootstrap import ratio_intervals


def ratio_interval(numerators, denominators, **options):
    (interval,) = ratio_intervals(np.column_stack([numerators, denominators]), [(0, 1)], **options)
    return interval


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sizes = generator.integers(5, 50, 60)
        means = generator.normal(2.0, 0.5, 60)  # documents differ: tokens of one are not independent
        low, high = ratio_interval(sizes * means, sizes, seed=trial)
        covered += low <= 2.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_treating_the_tokens_as_independent_would_cover_far_less():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(40):
        sizes = generator.integers(5, 50, 60)
        means = generator.normal(2.0, 0.5, 60)
        tokens = np.repeat(means, sizes)
        low, high = ratio_interval(tokens, np.ones(len(tokens)), seed=trial)
        covered += low <= 2.0 <= high
    assert covered / 40 < 0.6


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(1).normal(size=50)
    assert ratio_interval(values, np.ones(50)) == ratio_interval(values, np.ones(50))
    assert ratio_interval(values, np.ones(50)) != ratio_interval(values, np.ones(50), seed=1)


@pytest.mark.parametrize("values", [np.ones(7), np.array([np.nan] * 20)])
def test_no_interval_where_there_is_too_little_to_tell(values):
    assert ratio_interval(values, np.ones(len(values))) is None


def test_no_interval_where_a_replicate_would_divide_by_zero():
    assert ratio_interval(np.ones(8), np.array([1.0] + [0.0] * 7)) is None
