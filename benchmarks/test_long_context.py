"""Read a million tokens in one stream, the state carried all the way.

The demo model was trained on this text: the loss by position counts, not how low it is.
"""

import pytest

pytestmark = pytest.mark.benchmark


def test_reads_a_million_tokens(lmeval, lm, corpus):
    result = lmeval.perplexity(lm, corpus("stdlib", "train"), tokens=1_000_000, positions=(8_000, 64_000, 512_000))

    assert result.tokens > 300_000
    if lm.tokenizer.name == "bytes":
        assert result.tokens == 999_999  # the first one has nothing before it
