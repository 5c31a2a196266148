"""Sums of vectors: those of the whole batch however they are cut and merged, and a low rank whose error is bounded."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pytest_lmeval.statistics._moments import Moments, merged

sklearn = pytest.importorskip("sklearn.decomposition")

RELATIVE = 1e-10


def vectors(count, width, *, offset=0.0, decay=0.7, seed=0):
    """Correlated vectors far from zero, whose variances fall."""
    generator = torch.Generator().manual_seed(seed)
    scales = decay ** torch.arange(width, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scales @ turned + offset


def added(rows, cuts, rank=None, kind=Moments):
    """The sums of parts of the rows, merged two by two."""
    parts = []
    for part in np.split(rows, sorted(cuts)):
        parts.append(kind(rows.shape[1], rank))
        for piece in part.split(5):
            parts[-1].add(piece)
    while len(parts) > 1:
        parts = [merged(parts[index : index + 2]) for index in range(0, len(parts), 2)]
    return parts[0]


class SumsOfSquares(Moments):
    """The sums that a textbook writes down: x and x x', subtracted at the end."""

    def add(self, rows):
        self.mean = self.mean + rows.sum(0)
        self.scatter += rows.T @ rows
        self.count += len(rows)

    def merge(self, other):
        self.mean, self.count = self.mean + other.mean, self.count + other.count
        self.scatter += other.scatter

    @property
    def covariance(self):
        return (self.scatter - torch.outer(self.mean, self.mean) / self.count) / (self.count - 1)


def relative_error(sums, rows):
    expected = torch.cov(rows.T)
    return float((sums.covariance - expected).abs().max() / expected.abs().max())


@given(cuts=st.sets(st.integers(1, 149), max_size=6), offset=st.sampled_from([0.0, 1e3, 1e6]), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_any_parts_merged_in_any_way_are_the_whole_batch(cuts, offset, seed):
    rows = vectors(150, 12, offset=offset, seed=seed)
    sums = added(rows, cuts)
    assert sums.count == 150
    centred = rows - rows.mean(0)
    assert float((sums.mean - rows.mean(0)).abs().max()) <= RELATIVE * max(1.0, offset)
    expected = centred.T @ centred / 149
    assert float((sums.covariance - expected).abs().max() / expected.abs().max()) < RELATIVE
    assert sums.total == pytest.approx(float(expected.trace()) * 149, rel=RELATIVE)


def test_sums_of_squares_would_not_be_as_exact():
    rows = vectors(150, 12, offset=1e6)
    assert relative_error(added(rows, {40, 90}), rows) < RELATIVE
    assert relative_error(added(rows, {40, 90}, kind=SumsOfSquares), rows) > 1e-6


def test_the_directions_are_those_of_incremental_pca_where_it_keeps_all_components():
    rows = vectors(400, 10, offset=3.0, decay=0.8)
    found = added(rows, {100, 250}).directions()
    pca = sklearn.IncrementalPCA(n_components=10, batch_size=40).fit(rows.numpy())
    np.testing.assert_allclose(found.variances, pca.explained_variance_, rtol=RELATIVE)
    np.testing.assert_allclose(found.explained, pca.explained_variance_ratio_, rtol=RELATIVE)
    np.testing.assert_allclose(found.vectors, pca.components_, atol=1e-9)
    few = sklearn.IncrementalPCA(n_components=3, batch_size=40).fit(rows.numpy())
    assert np.abs(few.explained_variance_ / found.variances[:3].numpy() - 1).max() > RELATIVE  # which drops the rest


@given(
    cuts=st.sets(st.integers(1, 199), max_size=4), rank=st.integers(2, 9), decay=st.floats(0.4, 1.0), seed=st.integers(0, 50)
)
@settings(max_examples=15, deadline=None)
def test_a_sketch_lacks_no_more_than_it_says_in_any_direction(cuts, rank, decay, seed):
    rows = vectors(200, 16, offset=10.0, decay=decay, seed=seed)
    sketch, exact = added(rows, cuts, rank), added(rows, cuts)
    lacking = torch.linalg.eigvalsh(exact.covariance - sketch.covariance)
    noise = RELATIVE * float(exact.covariance.trace())
    assert len(sketch.scatter) <= 2 * rank
    assert -noise <= float(lacking[0])
    assert float(lacking[-1]) <= sketch.error + noise
    assert sketch.total == pytest.approx(exact.total, rel=1e-9)
    variances = exact.directions().variances
    left = float(variances[rank // 2 :].sum())  # of the best approximation of half the rank
    assert sketch.error <= left / (rank - rank // 2) + noise
    shown = sketch.directions()
    assert bool((shown.variances <= variances[:rank] + noise).all())
    assert bool((variances[:rank] <= shown.variances + shown.error + noise).all())


def test_a_sketch_that_forgot_to_count_what_it_drops_would_be_noticed():
    rows = vectors(200, 16, decay=0.95)
    sketch, exact = added(rows, {100}, 4), added(rows, {100})
    sketch.lost = 0.0
    assert float(torch.linalg.eigvalsh(exact.covariance - sketch.covariance)[-1]) > sketch.error + 0.01


def test_a_sketch_of_vectors_of_low_rank_is_exact():
    rows = vectors(300, 3) @ vectors(3, 40, decay=1.0, seed=1)
    sketch, exact = added(rows, {77}, 5), added(rows, {77})
    assert sketch.error < RELATIVE * exact.total
    np.testing.assert_allclose(sketch.directions(3).variances, exact.directions(3).variances, rtol=1e-8)
    np.testing.assert_allclose(sketch.directions(3).vectors, exact.directions(3).vectors, atol=1e-7)


def test_there_are_no_more_directions_than_the_vectors_determine():
    assert added(vectors(4, 9), ()).directions().vectors.shape == (3, 9)
    one = added(vectors(1, 9), ())
    assert one.directions().vectors.shape == (0, 9)
    assert bool(one.covariance.isnan().all())


def test_vectors_of_half_precision_are_added_in_float64():
    rows = (100 + torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    sums = Moments(4)
    for piece in rows.split(100):
        sums.add(piece)
    assert relative_error(sums, rows.double()) < RELATIVE
