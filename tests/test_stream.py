"""The stream: every target is scored exactly once, whatever the chunks, and what cannot be scored is refused."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import LM, ids_of, losses_of, nll_of, stream, stream_in_windows
from tiny_models import VOCAB, Broken, Forgetful, LastOnly, Promising, Stateless

from pytest_lmeval.engine._losses import LOGITS_AT_ONCE, score
from pytest_lmeval.engine._policy import default_chunk_size
from pytest_lmeval.engine._tokens import overlapping, tokens_of
from pytest_lmeval.errors import ModelError, NotFiniteError, StreamError
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._certificate import Costs

SEVERAL = settings(max_examples=25)


def cross_entropy(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def targets_of(chunks):
    return [position for chunk in chunks for position in range(chunk.start, chunk.end)]


@SEVERAL
@given(st.integers(2, 200), st.integers(1, 80))
def test_any_chunk_size_scores_every_target_once_with_the_losses_of_one_full_pass(length, chunk_size):
    ids = ids_of(length)
    chunks = list(stream(LM, ids, chunk_size=chunk_size))
    np.testing.assert_allclose(nll_of(chunks), losses_of(ids), atol=1e-5)
    assert targets_of(chunks) == list(range(1, length))
    assert [len(chunk.nll) for chunk in chunks] == [chunk.end - chunk.start for chunk in chunks]
    assert {chunk.state_bytes for chunk in chunks} == {16 * 4}


def test_a_state_that_is_not_carried_gives_other_losses():
    assert np.abs(nll_of(stream(as_model(Forgetful()), ids_of(100), chunk_size=10)) - losses_of(ids_of(100))).max() > 0.01


@SEVERAL
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 50))
def test_the_pieces_that_tokens_arrive_in_do_not_matter(sizes, chunk_size):
    ids = ids_of(sum(sizes))
    pieces = stream(LM, iter(np.split(ids, np.cumsum(sizes)[:-1])), chunk_size=chunk_size)
    if len(ids) < 2:
        with pytest.raises(StreamError, match="fewer than two tokens"):
            list(pieces)
        return
    assert np.array_equal(nll_of(pieces), nll_of(stream(LM, ids, chunk_size=chunk_size)))


@SEVERAL
@given(st.integers(2, 120), st.integers(1, 40), st.none() | st.integers(1, 9), st.data())
def test_windows_score_every_target_once_in_its_context_whatever_the_chunks(length, window, chunk_size, data):
    overlap, ids = data.draw(st.integers(0, window - 1)), ids_of(length)
    lm = as_model(Stateless()) if chunk_size is None else LM
    chunks = list(stream_in_windows(lm, ids, window=window, overlap=overlap, chunk_size=chunk_size))
    assert targets_of(chunks) == list(range(1, length))
    expected = np.full(length, np.nan)
    for start in range(0, length - 1, window - overlap):
        part = ids[start : start + window + 1]
        positions = np.arange(start + 1, start + len(part))
        new = np.isnan(expected[positions])
        expected[positions[new]] = losses_of(part, lm)[new]
    np.testing.assert_allclose(nll_of(chunks), expected[1:], atol=1e-5)


def test_a_stream_resumes_after_any_chunk():
    ids = ids_of(100)
    head, whole = list(stream(LM, ids[:49], chunk_size=16)), stream(LM, ids, chunk_size=16)
    rest = stream(LM, ids[48:], chunk_size=16, state=head[-1].state, position=48)
    assert np.array_equal(nll_of([*head, *rest]), nll_of(whole))


def test_a_memory_mapped_file_is_read_in_slices(tmp_path):
    np.save(tmp_path / "ids.npy", ids_of(500).astype(np.uint16))
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    assert np.array_equal(nll_of(stream(LM, mapped, chunk_size=64)), nll_of(stream(LM, ids_of(500), chunk_size=64)))


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 11))
def test_overlapping_pieces_share_exactly_what_they_should(length, size, overlap):
    shared = min(overlap, size - 1) + 1
    found = [piece.ids for piece in overlapping(tokens_of(np.arange(length)), size + 1, shared)]
    for before, after in pairwise(found):
        assert list(after[:shared]) == list(before[-shared:])
    assert sorted({int(token) for piece in found for token in piece}) == (list(range(length)) if length > 1 else [])


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=4, max_size=4), min_size=1, max_size=20), st.data())
def test_the_rank_is_the_index_in_a_stable_sort(rows, data):
    logits = torch.tensor(rows)
    targets = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))))
    nll, rank = score(logits, targets)
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    assert rank.tolist() == [order[i].tolist().index(target) for i, target in enumerate(targets.tolist())]
    np.testing.assert_allclose(nll, cross_entropy(logits, targets), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_logits_than_are_scored_at_once_are_scored_alike_in_float32(dtype):
    rows = 2 * LOGITS_AT_ONCE // 4096 + 7
    logits, targets = torch.randn(rows, 4096).to(dtype).float(), torch.randint(0, 4096, (rows,))
    nll, rank = score(logits.to(dtype), targets)
    np.testing.assert_allclose(nll, cross_entropy(logits, targets), atol=1e-5)
    picked, ids = logits.gather(1, targets[:, None]), torch.arange(4096)
    assert np.array_equal(rank, ((logits > picked) | ((logits == picked) & (ids < targets[:, None]))).sum(1))


def test_the_chunk_size_follows_from_the_memory_budget_and_from_what_calls_cost():
    sizes = [default_chunk_size(replace(LM, vocab_size=vocab)) for vocab in (256, 32_000, 128_256, 10_000_000)]
    assert sizes == [1024, 1024, 512, 16]
    assert [default_chunk_size(LM, Costs(call=call, reach=4096)) for call in (32, 2, 4096)] == [512, 128, 1024]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "fewer than two tokens"),
        ([3], "fewer than two tokens"),
        (np.zeros((2, 3), int), "a row of integer token ids"),
        (np.array([0.5, 1.5]), "a row of integer token ids"),
        (5, "the single id 5"),
        (None, "got NoneType"),
    ],
)
def test_a_stream_that_cannot_be_scored_is_refused(ids, message):
    with pytest.raises(StreamError, match=message):
        list(stream(LM, ids))


@pytest.mark.parametrize(("wrong", "position"), [(VOCAB, 40), (-1, 3), (10**6, 0)])
def test_a_token_outside_the_vocabulary_is_named(wrong, position):
    ids = ids_of(60)
    ids[position] = wrong
    with pytest.raises(StreamError, match=rf"token {position} of the stream has id {wrong}.* 0 to {VOCAB - 1}"):
        list(stream(LM, ids, chunk_size=16))


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_a_nan_is_reported_with_its_position_after_the_chunks_before_it(chunk_size):
    ids = np.where(ids_of(60) == 7, 8, ids_of(60))
    ids[41] = 7
    scored = []
    with pytest.raises(NotFiniteError, match=rf"loss of nan for token 42 of the stream \(id {ids[42]}, after id 7\)"):
        scored.extend(stream(as_model(Broken()), ids, chunk_size=chunk_size))
    assert [chunk.end for chunk in scored] == list(range(chunk_size + 1, 43, chunk_size))


@pytest.mark.parametrize(
    ("model", "message"),
    [(LastOnly, r"shape \[1, 4\].*\[1, 1, 32\]; expected \[1, 4, 32\]"), (Promising, "returned no state after 4")],
)
def test_wrong_logits_and_states_are_refused(model, message):
    with pytest.raises(ModelError, match=message):
        list(stream(as_model(model()), ids_of(10), chunk_size=4))
