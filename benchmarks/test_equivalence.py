"""Check that a model reads in chunks as it reads at once, by every law."""

import pytest

pytestmark = pytest.mark.benchmark

ACCEPTED = {"exact-any-chunk", "exact-step-only", "stateless", "consistent"}


def test_streams_exactly(lmeval, lm):
    result = lmeval.equivalence(lm)

    assert result.verdict in ACCEPTED, result
