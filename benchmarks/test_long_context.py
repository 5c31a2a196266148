"""A million tokens, for real: read as one stream whose state is carried all the way, in constant memory."""

import pytest

pytestmark = pytest.mark.benchmark


def test_reads_a_million_tokens(lmeval, lm, corpus):
    result = lmeval.perplexity(lm, corpus("stdlib", "train"), tokens=1_000_000, positions=(8_000, 64_000, 512_000))

    assert result.tokens == 999_999  # the first token has nothing before it
    assert result.loss_by_position.x[-1] > 500_000
