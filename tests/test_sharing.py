"""Prefix sharing: the same likelihoods, with each distinct token read about once, in any model."""

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import CHEAP, LM, engine_of, losses_of
from tiny_models import VOCAB, Dropped, Forgetful, Functional, GetSetState, Neighbourly, Shared, Stateless, Stepper

from pytest_lmeval import as_model, load
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.engine._tree import Request, tree, worth_a_step

thorough = pytest.mark.thorough
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


def worst(lm, engine, asked):
    """The largest difference to the log-likelihoods of a text that is read alone."""
    scored, alone = engine.score(asked), [-losses_of(request.ids, lm)[request.context_len - 1 :] for request in asked]
    return max(np.abs(found.loglikelihood - expected).max() for found, expected in zip(scored, alone, strict=True))


def distinct(asked):
    return len({tuple(request.read[:length]) for request in asked for length in range(1, len(request.read) + 1)})


@settings(max_examples=100)
@given(requests(), st.booleans(), st.sampled_from([0, 3, 8, inf]))
def test_a_tree_holds_every_token_and_every_target_once_and_a_leaf_for_each_prompt(asked, prompts, step):
    asked = [Request(request.ids, len(request.ids)) for request in asked] if prompts else asked
    targets, tokens, ends = [], 0, {}

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
        if not node.children:
            ends[node.owner] = text

    for node in tree(asked, step=step):
        visit(node, [])
    expected = [(n, p) for n, request in enumerate(asked) for p in range(request.context_len - 1, len(request.ids) - 1)]
    assert sorted(targets) == expected
    assert tokens >= distinct(asked)
    if prompts:
        assert ends == {number: list(request.ids) for number, request in enumerate(asked)}
    elif step == 0:
        assert tokens == distinct(asked)


def test_short_runs_are_read_again_rather_than_in_a_step():
    assert not worth_a_step(16, 2, 16)
    assert worth_a_step(17, 2, 16)
    shared = [Request(np.array([1, 2, 3, end, 9]), 3) for end in (4, 5)]
    assert [len(node.ids) for node in tree(shared, step=16)] == [4, 4]
    assert [len(node.ids) for node in tree(shared, step=0)] == [3]


@settings(max_examples=40)
@given(requests(), st.integers(1, 4), st.booleans(), st.sampled_from([1, 4]), st.integers(1, 3))
def test_shared_prefixes_change_no_likelihood(asked, batch_size, share, multiple, blocks):
    engine = engine_of(LM, batch_size, share, multiple)
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
    multiples = engine_of(LM, multiple=16)
    assert worst(LM, multiples, sharing(50, 4, rest=9)) < 1e-5
    assert multiples.counts.tokens == 48 + 4 * (58 - 48)


def test_tokens_are_counted_for_the_first_request_that_reads_them():
    asked = [Request(np.array([1] * 20 + [2, 3, end]), 22) for end in (4, 5)] + [Request(np.array([1] * 20 + [5, 6]), 21)]
    engine = engine_of(LM)
    assert [scored.read for scored in engine.score(asked)] == [22, 0, 1]
    assert engine.counts.tokens == 23


def test_padding_costs_no_more_than_the_calls_that_it_saves():
    rng = np.random.default_rng(2)
    engine = engine_of(LM, batch_size=8)
    engine.score([Request(rng.integers(VOCAB, size=length), 2) for length in rng.integers(3, 80, size=50)])
    assert 0 < engine.counts.padding <= CHEAP.call * engine.counts.calls


class Joint(Functional):
    """Keeps all rows in one axis with the features, so that its state cannot be divided."""

    def forward(self, input_ids, state=None):
        logits, hidden = super().forward(input_ids, None if state is None else state.reshape(1, -1, 16))
        return logits, hidden.reshape(-1)


@pytest.mark.parametrize("kind", [GetSetState, Stateless, Stepper, Joint])
def test_other_forms_of_models_give_the_same(kind):
    assert worst(LM, engine_of(as_model(kind()), batch_size=2), sharing(30, 5)) < 1e-5


@pytest.mark.parametrize("kind", [Dropped, Forgetful])
def test_a_wrong_state_gives_other_likelihoods(kind):
    lm = as_model(kind())
    asked = [Request(np.array([1, 2, 3] * 8 + [end, 5, 6]), 24) for end in (1, 2, 4)]
    assert worst(lm, engine_of(lm, share=False), asked) < 1e-5
    assert worst(lm, engine_of(lm), asked) > 1e-3


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
