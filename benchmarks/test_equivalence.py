"""Is reading in chunks the same as reading at once? Every law, tried by hypothesis; the verdict stands on every number."""

import pytest

pytestmark = pytest.mark.benchmark

STREAMS_OR_SAYS_SO = {"exact-any-chunk", "exact-step-only", "stateless", "consistent"}


def test_streams_exactly(lmeval, lm):
    result = lmeval.equivalence(lm)

    assert result.verdict in STREAMS_OR_SAYS_SO, result
