"""The losses of a row do not depend on batch size, order, neighbours or padding."""

import numpy as np
import pytest
from clean_models import CLEAN
from hypothesis import given, settings, strategies as st
from reading import stream
from tiny_models import VOCAB, Broken, Functional, Neighbourly, Seeing, Stateless

from pytest_lmeval import as_model, score_rows
from pytest_lmeval.errors import NotFiniteError, StreamError

MORE = [pytest.param(CLEAN[name], marks=pytest.mark.thorough) for name in ("Windowed", "Selective")]
rows = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=24), min_size=1, max_size=9)


def off(model, sequences, batch_size, order):
    """Largest difference of the losses in batches, in another order, to those of each row alone."""
    lm = as_model(model)
    alone = [score_rows(lm, [row])[0] for row in sequences]
    shuffled = score_rows(lm, [sequences[index] for index in order], batch_size=batch_size)
    return max(float(np.abs(alone[index] - nll).max()) for index, nll in zip(order, shuffled, strict=True))


@pytest.mark.parametrize("model", [Functional, Stateless, CLEAN["Experts"], *MORE])
@settings(max_examples=12)
@given(sequences=rows, batch_size=st.integers(1, 9), data=st.data())
def test_the_losses_of_a_row_do_not_depend_on_its_batch(model, sequences, batch_size, data):
    order = data.draw(st.permutations(range(len(sequences))))
    assert off(model(), sequences, batch_size, order) < 1e-5


@pytest.mark.parametrize("model", [Neighbourly, Seeing])  # the first sees its neighbours, the second the padding
def test_a_model_that_sees_its_batch_is_noticed(model):
    sequences = [list(range(20)), [9, *range(16)], [7] * 20]  # similar lengths, so that they share a batch
    assert off(model(), sequences, 3, (2, 0, 1)) > 2e-5


def test_a_row_has_the_losses_of_a_stream_and_no_rows_have_none():
    lm = as_model(Functional())
    ids = np.arange(30) % VOCAB
    streamed = np.concatenate([chunk.nll for chunk in stream(lm, ids, chunk_size=7)])
    assert np.allclose(score_rows(lm, [[1, 2], ids])[1], streamed, atol=1e-5)
    assert score_rows(lm, []) == []


@pytest.mark.parametrize(
    ("sequences", "says"),
    [
        ([[1, 2], [3]], "row 1: it has one token"),
        ([[1, 2], [[3, 4]]], r"row 1: .* \[1, 2\] of int64"),
        ([[1, 2], [3.5, 1.0]], r"row 1: .* of float64"),
        ([[1, 2], [3, 99]], "row 1: token 1 of the stream has id 99"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(sequences, says):
    with pytest.raises(StreamError, match=says):
        score_rows(as_model(Functional()), sequences)


def test_a_loss_of_nan_is_named_with_its_row_and_an_empty_batch_refused():
    with pytest.raises(NotFiniteError, match=r"row 1: .*loss of nan for token 2"):
        score_rows(as_model(Broken()), [[1, 2, 3], [1, 7, 3]])
    with pytest.raises(StreamError, match="at least one row"):
        score_rows(as_model(Functional()), [[1, 2]], batch_size=0)
