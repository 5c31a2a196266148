"""Measure what memory beyond a window is worth: a model with fast weights and one with a window read one long text.

The text is `recall`: pairs of a key and a value, so that the lowest loss is known with a memory of everything and of the last
tokens only. A model that learns as it reads should stay below the second one, which the window cannot.
"""

import pytest
import torch

from pytest_lmeval import Value, as_model
from pytest_lmeval.data._recall import Recall, entropy_at, entropy_in_window
from pytest_lmeval.zoo._transformer import Transformer
from pytest_lmeval.zoo._ttt import TTT

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

TEXT, STEPS = "recall:skew=1", 800
WINDOW, LAYERS = 16, 2
SEEN = LAYERS * (WINDOW - 1) + 1  # tokens that reach a prediction through all layers
POSITIONS = (1_000, 8_000, 16_000, 24_000)


def ttt():
    return TTT(width=64, layers=LAYERS, heads=2, hidden=128)


def windowed():
    return Transformer(width=64, layers=LAYERS, heads=4, hidden=128, window=WINDOW)


@pytest.mark.parametrize("build", [ttt, windowed])
def test_loss_by_position(lmeval, corpus, build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = as_model(build(), spec=build.__name__)
    trained = lmeval.train(lm, corpus(TEXT, "train"), steps=STEPS, batch_size=8, seq_len=512, lr=3e-3)
    result = lmeval.perplexity(trained.lm, corpus(TEXT, "test"), tokens=32_768, positions=POSITIONS)

    source = Recall(skew=1)
    everything = (entropy_at(source, POSITIONS[-1]) + entropy_at(source, POSITIONS[-1] + 1)) / 2  # a key and its value
    possible = {f"memory_of_{seen}": Value(entropy_in_window(source, seen), "nats/token") for seen in (SEEN, 1)}
    lmeval.record(trained.lm, f"least possible on {TEXT}", memory_of_all=Value(everything, "nats/token"), **possible)

    assert set(result.loss_at) == set(POSITIONS)
    if build is ttt:
        assert result.fast_weights.count == 2 * LAYERS
        assert not result.fast_weights.unchanged
        assert result.loss_at[24_000] < possible[f"memory_of_{SEEN}"]  # better than any model with that window
