"""The stream: every target is scored exactly once, whatever the chunks, and what cannot be scored is refused."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import stream, stream_in_windows
from tiny_models import VOCAB, Broken, Forgetful, Functional, LastOnly, Promising, Stateless

from pytest_lmeval.engine._losses import score
from pytest_lmeval.engine._policy import default_chunk_size
from pytest_lmeval.engine._tokens import overlapping, tokens_of
from pytest_lmeval.errors import ModelError, NotFiniteError, StreamError
from pytest_lmeval.models._sources import as_model

LM = as_model(Functional())
SEVERAL = settings(max_examples=60)


def ids_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def full_nll(ids, model=LM):
    with torch.no_grad():
        logits, _ = model.step(torch.from_numpy(ids)[None, :-1])
    return torch.nn.functional.cross_entropy(logits[0].double(), torch.from_numpy(ids[1:]), reduction="none").numpy()


def nll_of(chunks):
    return np.concatenate([chunk.nll for chunk in chunks])


@SEVERAL
@given(st.integers(2, 200), st.integers(1, 80))
def test_any_chunk_size_gives_the_losses_of_one_full_pass(length, chunk_size):
    ids = ids_of(length)
    np.testing.assert_allclose(nll_of(stream(LM, ids, chunk_size=chunk_size)), full_nll(ids), atol=1e-5)


def test_a_state_that_is_not_carried_gives_other_losses():
    ids = ids_of(100)
    forgetful = as_model(Forgetful())
    assert np.abs(nll_of(stream(forgetful, ids, chunk_size=10)) - full_nll(ids)).max() > 0.01


@SEVERAL
@given(st.integers(2, 200), st.integers(1, 80))
def test_chunks_follow_one_another_and_cover_every_target_once(length, chunk_size):
    chunks = list(stream(LM, ids_of(length), chunk_size=chunk_size))
    covered = [place for chunk in chunks for place in range(chunk.start, chunk.end)]
    assert covered == list(range(1, length))
    assert [len(chunk.nll) for chunk in chunks] == [chunk.end - chunk.start for chunk in chunks]


@SEVERAL
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 50))
def test_how_the_tokens_arrive_does_not_matter(sizes, chunk_size):
    ids = ids_of(sum(sizes))
    parts = np.split(ids, np.cumsum(sizes)[:-1])
    if len(ids) < 2:
        with pytest.raises(StreamError, match="fewer than two tokens"):
            list(stream(LM, iter(parts), chunk_size=chunk_size))
        return
    assert np.array_equal(
        nll_of(stream(LM, iter(parts), chunk_size=chunk_size)), nll_of(stream(LM, ids, chunk_size=chunk_size))
    )


@SEVERAL
@given(st.integers(2, 120), st.integers(1, 40), st.data())
def test_windows_score_every_target_once_with_what_the_window_holds(length, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    ids = ids_of(length)
    stateless = as_model(Stateless())
    chunks = list(stream_in_windows(stateless, ids, window=window, overlap=overlap))
    assert [place for chunk in chunks for place in range(chunk.start, chunk.end)] == list(range(1, length))
    stride, expected = window - overlap, np.full(length, np.nan)
    for start in range(0, length, stride):
        part = ids[start : start + window + 1]
        if len(part) > 1:
            fresh = full_nll(part, stateless)
            places = np.arange(start + 1, start + len(part))
            new = np.isnan(expected[places])
            expected[places[new]] = fresh[new]
    np.testing.assert_allclose(nll_of(chunks), expected[1:], atol=1e-5)


@SEVERAL
@given(st.integers(10, 120), st.integers(1, 9))
def test_chunks_inside_a_window_change_nothing(length, chunk_size):
    ids = ids_of(length)
    whole = nll_of(stream_in_windows(LM, ids, window=20, overlap=7))
    np.testing.assert_allclose(
        nll_of(stream_in_windows(LM, ids, window=20, overlap=7, chunk_size=chunk_size)), whole, atol=1e-5
    )


def test_a_stream_goes_on_from_any_chunk():
    ids = ids_of(100)
    whole = list(stream(LM, ids, chunk_size=16))
    head = list(stream(LM, ids, chunk_size=16))[:3]
    rest = stream(LM, ids[48:], chunk_size=16, state=head[-1].state, position=48)
    assert np.array_equal(nll_of([*head, *rest]), nll_of(whole))


def test_a_memory_mapped_file_is_read_in_slices(tmp_path):
    np.save(tmp_path / "ids.npy", ids_of(500).astype(np.uint16))
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    assert np.array_equal(nll_of(stream(LM, mapped, chunk_size=64)), nll_of(stream(LM, ids_of(500), chunk_size=64)))


@SEVERAL
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 11))
def test_overlapping_pieces_share_exactly_what_they_should(length, size, overlap):
    overlap = min(overlap, size - 1)
    found = [piece.ids for piece in overlapping(tokens_of(np.arange(length)), size, overlap)]
    for before, after in pairwise(found):
        assert list(after[: overlap + 1]) == list(before[-overlap - 1 :])
    assert sorted({int(token) for piece in found for token in piece}) == (list(range(length)) if length > 1 else [])


@SEVERAL
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=4, max_size=4), min_size=1, max_size=20), st.data())
def test_rank_is_the_place_in_a_stable_sort(rows, data):
    logits = torch.tensor(rows)
    targets = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))))
    nll, rank = score(logits, targets)
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    assert rank.tolist() == [order[i].tolist().index(target) for i, target in enumerate(targets.tolist())]
    np.testing.assert_allclose(nll, torch.nn.functional.cross_entropy(logits, targets, reduction="none"), atol=1e-6)


def test_scoring_in_blocks_of_rows_changes_nothing(monkeypatch):
    logits, targets = torch.randn(100, 64), torch.randint(0, 64, (100,))
    whole = score(logits, targets)
    monkeypatch.setattr("pytest_lmeval.engine._losses.LOGITS_AT_ONCE", 64 * 7)
    blocks = score(logits, targets)
    np.testing.assert_allclose(whole[0], blocks[0], atol=1e-6)
    assert np.array_equal(whole[1], blocks[1])


def test_bfloat16_logits_are_scored_in_float32():
    logits, targets = torch.randn(50, 64).bfloat16(), torch.randint(0, 64, (50,))
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    np.testing.assert_allclose(score(logits, targets)[0], expected, atol=1e-5)


def test_the_chunk_size_follows_from_the_memory_budget():
    sizes = [default_chunk_size(replace(LM, vocab_size=vocab)) for vocab in (256, 32_000, 128_256, 10_000_000)]
    assert sizes == [1024, 512, 128, 16]


def test_state_bytes_are_those_of_the_state():
    chunks = list(stream(LM, ids_of(100), chunk_size=10))
    assert {chunk.state_bytes for chunk in chunks} == {16 * 4}


@pytest.mark.parametrize("ids", [[], [3]])
def test_too_short_a_stream_is_refused(ids):
    with pytest.raises(StreamError, match="fewer than two tokens"):
        list(stream(LM, ids))


@pytest.mark.parametrize(("wrong", "place"), [(VOCAB, 40), (-1, 3), (10**6, 0)])
def test_a_token_outside_the_vocabulary_is_named(wrong, place):
    ids = ids_of(60)
    ids[place] = wrong
    with pytest.raises(StreamError, match=rf"token {place} of the stream has id {wrong}.* 0 to {VOCAB - 1}"):
        list(stream(LM, ids, chunk_size=16))


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_a_nan_is_reported_with_its_position_and_what_was_before_is_kept(chunk_size):
    ids = np.where(ids_of(60) == 7, 8, ids_of(60))
    ids[41] = 7
    scored = []
    with pytest.raises(NotFiniteError, match=rf"loss of nan for token 42 of the stream \(id {ids[42]}, after id 7\)"):
        scored.extend(stream(as_model(Broken()), ids, chunk_size=chunk_size))
    assert [chunk.end for chunk in scored] == list(range(chunk_size + 1, 43, chunk_size))


def test_logits_of_the_wrong_shape_are_refused():
    with pytest.raises(ModelError, match=r"shape \[1, 9\].*\[1, 1, 32\]; expected \[1, 9, 32\]"):
        list(stream(as_model(LastOnly()), ids_of(10)))


def test_a_missing_state_is_refused():
    with pytest.raises(ModelError, match="returned no state after 4"):
        list(stream(as_model(Promising()), ids_of(10), chunk_size=4))


@pytest.mark.parametrize("ids", [np.zeros((2, 3), int), np.array([0.5, 1.5])])
def test_what_is_no_row_of_integers_is_refused(ids):
    with pytest.raises(StreamError, match="a row of integer token ids"):
        list(stream(LM, ids))


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(StreamError, match="chunk_size is -1"):
        list(stream(LM, ids_of(5), chunk_size=-1))
