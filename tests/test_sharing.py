"""What requests begin with alike is read once: the same likelihoods, for each distinct token about once, in any model."""

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import reader as engine_of
from tiny_models import VOCAB, Dropped, Forgetful, Functional, GetSetState, Neighbourly, Shared, Stateless, Stepper

from pytest_lmeval import as_model, load
from pytest_lmeval.engine._executor import PADDED
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.engine._tree import STEP, Request, tree, worth_a_step

LM = as_model(Functional())
ids = st.lists(st.integers(0, 2), min_size=1, max_size=12)  # few tokens, so that much is alike


@st.composite
def requests(draw):
    """Texts of like beginnings, some the beginning of others, some equal."""
    beginnings = draw(st.lists(ids, min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, 10))):
        text = draw(st.sampled_from(beginnings)) + draw(ids) + draw(ids)
        found.append(Request(np.array(text), draw(st.integers(1, len(text) - 1))))
    return found


def alone(lm, request):
    """The slow way: one text after the other, whole."""
    with torch.no_grad():
        logits, _ = lm.step(torch.from_numpy(request.read)[None])
    said = logits[0].log_softmax(-1)
    return np.array([said[place - 1, request.ids[place]].item() for place in range(request.context_len, len(request.ids))])


def worst(lm, reader, asked):
    scored = reader.score(asked)
    return max(np.abs(found.loglikelihood - alone(lm, request)).max() for found, request in zip(scored, asked, strict=True))


def distinct(asked):
    return len({tuple(request.read[:length]) for request in asked for length in range(1, len(request.read) + 1)})


# ---------------------------------------------------------------------------------------------- the tree


@given(requests(), st.sampled_from([0, 3, 8, inf]))
def test_a_tree_holds_every_token_and_every_wish_once(asked, step):
    wishes, tokens = [], 0

    def visit(node, before):
        nonlocal tokens
        assert len(node.ids) or not node.children
        tokens += len(node.ids)
        text = [*before, *node.ids]
        for number, begin, end in node.wanted:
            assert node.start <= begin < end <= node.end
            assert list(asked[number].read[:end]) == text[:end]
            wishes.extend((number, position) for position in range(begin, end))
        for child in node.children:
            assert child.start == node.end
            visit(child, text)

    for node in tree(asked, step=step):
        visit(node, [])
    expected = [(n, p) for n, request in enumerate(asked) for p in range(request.context_len - 1, len(request.ids) - 1)]
    assert sorted(wishes) == expected
    assert tokens >= distinct(asked)
    if step == 0:
        assert tokens == distinct(asked)


def test_short_runs_are_read_again_rather_than_in_steps_of_their_own():
    assert not worth_a_step(STEP, 2)
    assert worth_a_step(STEP + 1, 2)
    shared = [Request(np.array([1, 2, 3, end, 9]), 3) for end in (4, 5)]
    assert [len(node.ids) for node in tree(shared)] == [4, 4]
    assert [len(node.ids) for node in tree(shared, step=0)] == [3]


# -------------------------------------------------------------------------------------------- the reading


@given(requests(), st.integers(1, 4), st.booleans(), st.integers(1, 3))
def test_shared_beginnings_change_no_likelihood(asked, batch_size, share, blocks):
    reader = engine_of(LM, batch_size, share)
    for block in np.array_split(np.arange(len(asked)), blocks):
        if len(block):
            assert worst(LM, reader, [asked[number] for number in block]) < 1e-5


@pytest.mark.parametrize("name", ["transformer", "windowed", "lstm", "mamba", "mamba2", "ttt", "causal-bk"])
def test_every_model_of_the_zoo_may_be_shared(name):
    lm = load(f"zoo:{name}")
    chance = np.random.default_rng(0)
    shots, asked = chance.integers(256, size=90), []
    for passage in (chance.integers(256, size=length) for length in (31, 33, 70)):
        for question in (chance.integers(256, size=length) for length in (5, 9)):
            asked += [Request(np.concatenate([shots, passage, question, chance.integers(256, size=n)]), 125) for n in (2, 4)]
    reader = engine_of(lm, batch_size=4)
    assert worst(lm, reader, asked[:6]) < 2e-4
    assert worst(lm, reader, asked[6:]) < 2e-4
    assert reader.counts.tokens < 1.1 * distinct(asked) + 40


def test_each_distinct_token_is_read_about_once_and_the_shots_once_in_all_blocks():
    chance = np.random.default_rng(1)
    shots = chance.integers(VOCAB, size=300)
    asked = [Request(np.concatenate([shots, chance.integers(VOCAB, size=40)]), 335) for _ in range(60)]
    reader = engine_of(LM, batch_size=8)
    for begin in range(0, 60, 12):
        reader.score(asked[begin : begin + 12])
    assert reader.counts.tokens == pytest.approx(distinct(asked), rel=0.02)
    whole = engine_of(LM, batch_size=8, share=False)
    whole.score(asked)
    assert whole.counts.tokens == 60 * 339


def test_tokens_are_counted_to_the_first_request_that_reads_them():
    asked = [Request(np.array([1] * 20 + [2, 3, end]), 22) for end in (4, 5)] + [Request(np.array([1] * 20 + [5, 6]), 21)]
    reader = engine_of(LM)
    assert [scored.read for scored in reader.score(asked)] == [22, 0, 1]
    assert reader.counts.tokens == 23


def test_padding_stays_a_small_share():
    chance = np.random.default_rng(2)
    asked = [Request(chance.integers(VOCAB, size=length), 2) for length in chance.integers(3, 80, size=50)]
    reader = engine_of(LM, batch_size=8)
    reader.score(asked)
    assert reader.counts.padding <= PADDED * reader.counts.tokens


@pytest.mark.parametrize("kind", [GetSetState, Stateless, Stepper])
def test_other_forms_of_models_give_the_same(kind):
    lm = as_model(kind())
    chance = np.random.default_rng(3)
    beginning = chance.integers(VOCAB, size=30)
    asked = [Request(np.concatenate([beginning, chance.integers(VOCAB, size=4)]), 31) for _ in range(5)]
    scored = engine_of(lm, batch_size=2).score(asked)
    for found, request in zip(scored, asked, strict=True):
        np.testing.assert_allclose(found.loglikelihood, alone(LM, request), atol=1e-5)


@pytest.mark.parametrize("kind", [Dropped, Forgetful])
def test_a_state_that_is_wrong_would_be_found_by_this(kind):
    lm = as_model(kind())
    asked = [Request(np.array([1, 2, 3] * 8 + [end, 5, 6]), 24) for end in (1, 2, 4)]
    assert worst(lm, engine_of(lm, share=False), asked) < 1e-5
    assert worst(lm, engine_of(lm), asked) > 1e-3


def test_multiples_are_kept_to():
    lengths = []

    class Watched(Functional):
        def forward(self, input_ids, state=None):
            lengths.append((0 if state is None else int(state[1]), input_ids.shape[1]))
            logits, hidden = super().forward(input_ids, None if state is None else state[0])
            return logits, (hidden, torch.tensor(lengths[-1][0] + input_ids.shape[1]))

    lm = as_model(Watched())
    chance = np.random.default_rng(4)
    beginning = chance.integers(VOCAB, size=50)
    asked = [Request(np.concatenate([beginning, chance.integers(VOCAB, size=9)]), 55) for _ in range(4)]
    reader = engine_of(lm, multiple=16)
    assert selection(lm) is not None  # tried before
    del lengths[:]
    scored = reader.score(asked)
    assert {begin % 16 for begin, _ in lengths} == {0}
    assert (0, 48) in lengths
    for found, request in zip(scored, asked, strict=True):
        np.testing.assert_allclose(found.loglikelihood, alone(LM, request), atol=1e-5)


def test_a_state_that_cannot_be_divided_is_forked_for_each_row():
    class Joint(Functional):
        """Keeps its rows in one tensor, in which there is no telling them apart."""

        def forward(self, input_ids, state=None):
            logits, hidden = super().forward(input_ids, None if state is None else state.reshape(1, -1, 16))
            return logits, hidden.reshape(-1)

    lm = as_model(Joint())
    assert selection(lm) is None
    chance = np.random.default_rng(5)
    beginning = chance.integers(VOCAB, size=30)
    asked = [Request(np.concatenate([beginning, chance.integers(VOCAB, size=4)]), 31) for _ in range(5)]
    assert worst(lm, engine_of(lm, batch_size=4), asked) < 1e-5


@pytest.mark.parametrize(("kind", "divisible"), [(Functional, True), (Stateless, False), (Neighbourly, False), (Shared, False)])
def test_whether_a_state_can_be_divided_is_tried_not_believed(kind, divisible):
    assert (selection(as_model(kind())) is not None) == divisible


def test_a_state_that_has_other_tensors_later_is_not_divided():
    class Levels(Functional):
        """Keeps one tensor more for each call."""

        def forward(self, input_ids, state=None):
            logits, hidden = super().forward(input_ids, None if state is None else state[0])
            return logits, (hidden, *(() if state is None else state[1:]), hidden.clone())

    assert selection(as_model(Levels())) is None


def test_low_precision_does_not_hide_that_one_row_is_taken_for_another(monkeypatch):
    from pytest_lmeval.engine import _state_rows as state_rows

    assert selection(load("zoo:lstm@bf16")) is not None
    real = state_rows._selected
    monkeypatch.setattr(state_rows, "_selected", lambda state, rows, axes: real(state, [1] * len(rows), axes))
    assert selection(load("zoo:lstm@bf16")) is None


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_rows_taken_from_a_state_go_on_as_they_do_alone(rows):
    select = selection(LM)
    texts = LM.random_ids(3, 6)
    with torch.no_grad():
        _, state = LM.step(texts[:, :4])
        there, _ = LM.step(texts[rows, 4:], select(state, rows))
        whole, _ = LM.step(texts[rows])
    torch.testing.assert_close(there, whole[:, 4:], atol=1e-5, rtol=1e-5)
