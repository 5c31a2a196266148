"""A million tokens, for real: one stream, the state carried all the way, memory that grows no more than the state does.

The text is the longest that comes with Python: the split that the demo model was trained on. What is looked at here is whether
the reading holds out and how the loss goes on, not how low it is. Tokens larger than bytes make it some 700,000.
"""

import pytest

pytestmark = pytest.mark.benchmark


def test_reads_a_million_tokens(lmeval, lm, corpus):
    result = lmeval.perplexity(lm, corpus("stdlib", "train"), tokens=1_000_000, positions=(8_000, 64_000, 512_000))

    assert result.tokens > 300_000
    if lm.tokenizer.name == "bytes":
        assert result.tokens == 999_999  # the first one has nothing before it
