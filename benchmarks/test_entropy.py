"""Does the harness measure what it says? Texts whose entropy is known exactly, read by the models that are their sources.

What the source itself pays for a text is the least that any model can pay. Memory is worth a known number of nats too: of pairs
of keys and values, a model that remembers everything pays one price, and one that sees a window another.
"""

import math

import pytest

from pytest_lmeval import Value
from pytest_lmeval.data._recall import Recall, entropy_in_window

pytestmark = pytest.mark.benchmark

WINDOW = 65


@pytest.mark.parametrize("name", ["automaton", "recall"])
def test_the_source_pays_the_entropy(lmeval, load_lm, corpus, name):
    source, text = load_lm(f"pytest_lmeval.data.{name}:load"), corpus(name, "test")
    result = lmeval.perplexity(source, text)
    ratio = result.perplexity / math.exp(text.entropy)
    lmeval.record(source, f"perplexity of {text} over that of its entropy", ratio=Value(ratio, n=result.tokens))

    assert ratio == pytest.approx(1, abs=0.005)


def test_the_interval_contains_the_entropy(lmeval, load_lm, corpus):
    text = corpus("automaton", "test")
    result = lmeval.perplexity(load_lm("pytest_lmeval.data._automaton:load"), text)

    assert result.perplexity.low < math.exp(text.entropy) < result.perplexity.high


def test_a_window_pays_what_it_forgets(lmeval, load_lm, corpus):
    result = lmeval.perplexity(load_lm("pytest_lmeval.data._recall:load_windowed"), corpus("recall", "test"))

    assert float(result.nll) == pytest.approx(entropy_in_window(Recall(), WINDOW), rel=0.002)


@pytest.mark.parametrize("name", ["automaton", "recall"])
def test_no_model_pays_less(lmeval, lm, corpus, name):
    text = corpus(name, "test")
    result = lmeval.perplexity(lm, text, tokens=50_000)

    assert result.bits_per_byte.high > text.entropy / math.log(2)
