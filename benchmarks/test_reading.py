"""Measure perplexity on one long stream of real text, the state carried from beginning to end.

pytest benchmarks/test_reading.py --lm hf:./my-checkpoint
"""

import pytest

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("split", ["validation", "test"])
def test_reads_held_out_text(lmeval, lm, corpus, split):
    result = lmeval.perplexity(lm, corpus("stdlib", split))

    assert result.bits_per_byte < 8  # the loss of knowing nothing


def test_context_helps(lmeval, lm, corpus):
    result = lmeval.perplexity(lm, corpus("stdlib", "test"), as_stream=False, limit=30)

    losses = result.loss_by_position.y
    assert losses[-1] < losses[0]  # the hundredth token is easier to guess than the second
