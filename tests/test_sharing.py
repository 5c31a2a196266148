"""Prefix sharing: the same likelihoods, with each distinct token read about once, in any model."""

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import engine_of
from tiny_models import VOCAB, Dropped, Forgetful, Functional, GetSetState, Neighbourly, Shared, Stateless, Stepper

from pytest_lmeval import as_model, load
from pytest_lmeval.engine._executor import PADDED
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.engine._tree import STEP_COST, Request, tree, worth_a_step

thorough = pytest.mark.thorough
LM = as_model(Functional())
ids = st.lists(st.integers(0, 2), min_size=1, max_size=12)  # few ids, so that many prefixes are equal


@st.composite
def requests(draw):
    """Texts with shared prefixes, some of them prefixes of others, some equal."""
    prefixes = draw(st.lists(ids, min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, 10))):
        text = draw(st.sampled_from(prefixes)) + draw(ids) + draw(ids)
        found.append(Request(np.array(text), draw(st.integers(1, len(text) - 1))))
    return found


def sharing(prefix_len, count, rest=4, seed=0):
    """Requests that share a random prefix."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(VOCAB, size=prefix_len)
    return [Request(np.concatenate([prefix, rng.integers(VOCAB, size=rest)]), prefix_len + 1) for _ in range(count)]


def alone(lm, request):
    """The log-likelihoods of a text that is read alone."""
    with torch.no_grad():
        logits, _ = lm.step(torch.from_numpy(request.read)[None])
    log_p = logits[0].log_softmax(-1)
    return np.array([log_p[at - 1, request.ids[at]].item() for at in range(request.context_len, len(request.ids))])


def worst(lm, engine, asked):
    scored = engine.score(asked)
    return max(np.abs(found.loglikelihood - alone(lm, request)).max() for found, request in zip(scored, asked, strict=True))


def distinct(asked):
    return len({tuple(request.read[:length]) for request in asked for length in range(1, len(request.read) + 1)})


# ---------------------------------------------------------------------------------------------- the tree


@settings(max_examples=60)
@given(requests(), st.sampled_from([0, 3, 8, inf]))
def test_a_tree_holds_every_token_and_every_target_once(asked, step):
    targets, tokens = [], 0

    def visit(node, before):
        nonlocal tokens
        assert len(node.ids) or not node.children
        tokens += len(node.ids)
        text = [*before, *node.ids]
        for number, begin, end in node.wanted:
            assert node.start <= begin < end <= node.end
            assert list(asked[number].read[:end]) == text[:end]
            targets.extend((number, position) for position in range(begin, end))
        for child in node.children:
            assert child.start == node.end
            visit(child, text)

    for node in tree(asked, step=step):
        visit(node, [])
    expected = [(n, p) for n, request in enumerate(asked) for p in range(request.context_len - 1, len(request.ids) - 1)]
    assert sorted(targets) == expected
    assert tokens >= distinct(asked)
    if step == 0:
        assert tokens == distinct(asked)


def test_short_runs_are_read_again_rather_than_in_a_step():
    assert not worth_a_step(STEP_COST, 2)
    assert worth_a_step(STEP_COST + 1, 2)
    shared = [Request(np.array([1, 2, 3, end, 9]), 3) for end in (4, 5)]
    assert [len(node.ids) for node in tree(shared)] == [4, 4]
    assert [len(node.ids) for node in tree(shared, step=0)] == [3]


# -------------------------------------------------------------------------------------------- the likelihoods


@settings(max_examples=40)
@given(requests(), st.integers(1, 4), st.booleans(), st.integers(1, 3))
def test_shared_prefixes_change_no_likelihood(asked, batch_size, share, blocks):
    engine = engine_of(LM, batch_size, share)
    for block in np.array_split(np.arange(len(asked)), blocks):
        if len(block):
            assert worst(LM, engine, [asked[number] for number in block]) < 1e-5


MORE = ["transformer", "lstm", "mamba", "ttt", "causal-bk"]


@pytest.mark.parametrize("name", ["windowed", "mamba2", *(pytest.param(name, marks=thorough) for name in MORE)])
def test_models_of_the_zoo_share_prefixes(name):
    lm = load(f"zoo:{name}")
    rng = np.random.default_rng(0)
    shots, asked = rng.integers(256, size=90), []
    for passage in (rng.integers(256, size=length) for length in (31, 33, 70)):
        for question in (rng.integers(256, size=length) for length in (5, 9)):
            asked += [Request(np.concatenate([shots, passage, question, rng.integers(256, size=n)]), 125) for n in (2, 4)]
    engine = engine_of(lm, batch_size=4)
    assert worst(lm, engine, asked[:6]) < 2e-4
    assert worst(lm, engine, asked[6:]) < 2e-4
    assert engine.counts.tokens < 1.1 * distinct(asked) + 40


def test_each_distinct_token_is_read_about_once_and_the_prefix_once_in_all_blocks():
    asked = sharing(300, 60, rest=40)
    engine, whole = (engine_of(LM, batch_size=8, share=share) for share in (True, False))
    for begin in range(0, 60, 12):
        engine.score(asked[begin : begin + 12])
    assert engine.counts.tokens == pytest.approx(distinct(asked), rel=0.02)
    whole.score(asked)
    assert whole.counts.tokens == 60 * 339


def test_tokens_are_counted_for_the_first_request_that_reads_them():
    asked = [Request(np.array([1] * 20 + [2, 3, end]), 22) for end in (4, 5)] + [Request(np.array([1] * 20 + [5, 6]), 21)]
    engine = engine_of(LM)
    assert [scored.read for scored in engine.score(asked)] == [22, 0, 1]
    assert engine.counts.tokens == 23


def test_padding_stays_a_small_fraction():
    rng = np.random.default_rng(2)
    engine = engine_of(LM, batch_size=8)
    engine.score([Request(rng.integers(VOCAB, size=length), 2) for length in rng.integers(3, 80, size=50)])
    assert 0 < engine.counts.padding <= PADDED * engine.counts.tokens


@pytest.mark.parametrize("kind", [GetSetState, Stateless, Stepper])
def test_other_forms_of_models_give_the_same(kind):
    assert worst(LM, engine_of(as_model(kind()), batch_size=2), sharing(30, 5)) < 1e-5


@pytest.mark.parametrize("kind", [Dropped, Forgetful])
def test_a_wrong_state_gives_other_likelihoods(kind):
    lm = as_model(kind())
    asked = [Request(np.array([1, 2, 3] * 8 + [end, 5, 6]), 24) for end in (1, 2, 4)]
    assert worst(lm, engine_of(lm, share=False), asked) < 1e-5
    assert worst(lm, engine_of(lm), asked) > 1e-3


def test_a_state_is_continued_after_multiples_only():
    steps = []

    class Recording(Functional):
        def forward(self, input_ids, state=None):
            steps.append((0 if state is None else int(state[1]), input_ids.shape[1]))
            logits, hidden = super().forward(input_ids, None if state is None else state[0])
            return logits, (hidden, torch.tensor(steps[-1][0] + input_ids.shape[1]))

    lm = as_model(Recording())
    engine = engine_of(lm, multiple=16)
    assert selection(lm) is not None  # found by steps of its own
    steps.clear()
    asked = sharing(50, 4, rest=9)
    scored = engine.score(asked)
    assert {begin % 16 for begin, _ in steps} == {0}
    assert (0, 48) in steps
    for found, request in zip(scored, asked, strict=True):
        np.testing.assert_allclose(found.loglikelihood, alone(LM, request), atol=1e-5)


# -------------------------------------------------------------------------------------------- rows of states


class Joint(Functional):
    """Keeps all rows in one axis with the features."""

    def forward(self, input_ids, state=None):
        logits, hidden = super().forward(input_ids, None if state is None else state.reshape(1, -1, 16))
        return logits, hidden.reshape(-1)


class Levels(Functional):
    """Keeps one tensor more for each call."""

    def forward(self, input_ids, state=None):
        logits, hidden = super().forward(input_ids, None if state is None else state[0])
        return logits, (hidden, *(() if state is None else state[1:]), hidden.clone())


class FirstRow(Functional):
    """Continues each row from the state of the first one."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, None if state is None else state[:, :1].expand_as(state).contiguous())


@pytest.mark.parametrize(
    ("kind", "divisible"),
    [(Functional, True), (Stateless, False), (Neighbourly, False), (Shared, False), (Joint, False), (Levels, False)],
)
def test_a_state_is_divided_into_rows_only_if_they_continue_alone(kind, divisible):
    assert (selection(as_model(kind())) is not None) == divisible


def test_a_state_that_cannot_be_divided_is_forked_for_each_row():
    lm = as_model(Joint())
    assert worst(lm, engine_of(lm, batch_size=4), sharing(30, 5)) < 1e-5


@pytest.mark.parametrize(("kind", "divisible"), [(Functional, True), (FirstRow, False)])
def test_low_precision_does_not_hide_a_wrong_row(kind, divisible):
    module = kind().bfloat16()
    with torch.no_grad():
        module.head.bias[0] += 20  # the largest logit, whose rounding is more than the difference of two rows
    assert (selection(as_model(module)) is not None) == divisible


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_selected_rows_continue_as_they_do_alone(rows):
    select = selection(LM)
    texts = LM.random_ids(3, 6)
    with torch.no_grad():
        _, state = LM.step(texts[:, :4])
        selected, _ = LM.step(texts[rows, 4:], select(state, rows))
        whole, _ = LM.step(texts[rows])
    torch.testing.assert_close(selected, whole[:, 4:], atol=1e-5, rtol=1e-5)
