"""Check measured losses against exact entropies: texts of known sources, read by their sources.

No model has a lower expected loss than the source. Memory is worth a known number of nats too: on pairs of keys and values, a
model that remembers everything has one loss, and one that sees a window another.
"""

import math

import pytest

from pytest_lmeval import Value
from pytest_lmeval.data._recall import Recall, entropy_in_window

pytestmark = pytest.mark.benchmark

WINDOW = 65


@pytest.mark.parametrize("name", ["automaton", "recall"])
def test_the_loss_of_the_source_is_the_entropy(lmeval, load_lm, corpus, name):
    source, text = load_lm(f"pytest_lmeval.data._{name}:load"), corpus(name, "test")
    result = lmeval.perplexity(source, text)
    ratio = result.perplexity / math.exp(text.entropy)
    lmeval.record(source, f"perplexity of {text} over that of its entropy", ratio=Value(ratio, n=result.tokens))

    assert ratio == pytest.approx(1, abs=0.005)


def test_the_interval_contains_the_entropy(lmeval, load_lm, corpus):
    text = corpus("automaton", "test")
    result = lmeval.perplexity(load_lm("pytest_lmeval.data._automaton:load"), text)

    assert result.perplexity.low < math.exp(text.entropy) < result.perplexity.high


def test_a_window_loses_what_it_forgets(lmeval, load_lm, corpus):
    result = lmeval.perplexity(load_lm("pytest_lmeval.data._recall:load_windowed"), corpus("recall", "test"))

    assert float(result.nll) == pytest.approx(entropy_in_window(Recall(), WINDOW), rel=0.002)


@pytest.mark.parametrize("name", ["automaton", "recall"])
def test_no_model_has_a_lower_loss(lmeval, lm, corpus, name):
    text = corpus(name, "test")
    result = lmeval.perplexity(lm, text, tokens=50_000)

    assert result.bits_per_byte.high > text.entropy / math.log(2)
