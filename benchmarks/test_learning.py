"""Train each model by one protocol (same tokens, order, optimizer, schedule, seed) and score it on held-out text.

    pytest benchmarks/test_learning.py --lm zoo:mamba --lm zoo:causal-bk --lmeval-seq-len 128
    pytest benchmarks/test_learning.py --lm zoo:mamba --lmeval-corpus wikitext-2 --lmeval-corpus c4 --lmeval-tokens 2M

Texts are those of `--lmeval-corpus`; by default the two that need no download. A trained model is not trained again.
"""

import statistics

import pytest

from pytest_lmeval import Value

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

STEPS = 300
TEST_SPLITS = {"c4": "validation"}  # where the hub has no test text


@pytest.fixture(scope="module")
def perplexities():
    """spec -> corpus -> perplexity; None where the test failed."""
    return {}


def test_learns(lmeval, lm, corpus, corpus_name, perplexities):
    reached = perplexities.setdefault(lm.spec, {})
    reached[corpus_name] = None

    trained = lmeval.train(lm, corpus(corpus_name, "train"), steps=STEPS)
    result = lmeval.perplexity(trained.lm, corpus(corpus_name, TEST_SPLITS.get(corpus_name, "test")), tokens=100_000)

    assert result.perplexity.high < lm.vocab_size / 4
    reached[corpus_name] = float(result.perplexity)


def test_mean_over_texts(lmeval, lm, perplexities):
    reached = dict(sorted(perplexities.get(lm.spec, {}).items()))
    failed = [name for name, value in reached.items() if value is None]
    if len(reached) < 2:
        pytest.skip("a mean is over several texts")
    assert not failed, f"no mean over {', '.join(reached)}: {', '.join(failed)} failed. The results of the others are kept."

    spread = statistics.stdev(reached.values())
    mean = Value(statistics.fmean(reached.values()), n=len(reached), higher_is_better=False)
    lmeval.record(lm, f"perplexity over {', '.join(reached)}", mean_perplexity=mean, standard_deviation=spread)
