"""Calls of models that cannot pack: as few as those of batches of whole sequences, with the same numbers."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from msgspec import structs
from probing import certificate
from reading import losses_of
from tiny_models import VOCAB, Functional, Growing, Stateless

from pytest_lmeval import as_model, policy_for
from pytest_lmeval.engine import Engine, Policy, Request, _lanes
from pytest_lmeval.engine._batches import Limits, cheapest, cheapest_parts, padded_parts
from pytest_lmeval.engine._lanes import cheapest_steps, rows_of
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.records._certificate import Costs

USUAL = Costs(call=32, reach=4096)
BATCH, QUESTIONS, ENDINGS = 8, 60, 4
RECURRENT, GROWING, STATELESS = (as_model(kind()) for kind in (Functional, Growing, Stateless))


def block(seed=0, common=6):
    """Questions with endings, as long as those of HellaSwag; some questions begin alike."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(VOCAB, size=(5, common))
    found = []
    for number in range(QUESTIONS):
        question = np.concatenate([starts[number % 5], rng.integers(VOCAB, size=rng.integers(12, 45))])
        for _ in range(ENDINGS):
            text = np.concatenate([question, rng.integers(VOCAB, size=rng.integers(5, 30))])
            found.append(Request(text, len(question)))
    return found


def counts_of(lm, asked):
    engine = Engine(lm, Policy(batch_size=BATCH, costs=USUAL))
    scored = engine.score(asked)
    for request, one in zip(asked[::17], scored[::17], strict=True):
        np.testing.assert_allclose(one.loglikelihood, -losses_of(request.ids, lm)[request.context_len - 1 :], atol=1e-5)
    return engine.counts


def distinct(asked):
    return len({tuple(request.read[:length]) for request in asked for length in range(1, len(request.read) + 1)})


@pytest.mark.parametrize(("lm", "most"), [(RECURRENT, 1.08), (GROWING, 1.3), (STATELESS, 3)])
def test_a_block_of_choices_takes_as_few_calls_as_batches_of_whole_sequences(lm, most):
    asked = block()
    counts = counts_of(lm, asked)
    assert counts.calls <= QUESTIONS * ENDINGS / BATCH
    assert counts.tokens <= most * distinct(asked)


def test_nodes_that_are_read_one_by_one_take_more_calls(monkeypatch):
    """So the test before can fail."""
    monkeypatch.setattr(_lanes, "rows_of", lambda length, limits: 1)
    monkeypatch.setattr(_lanes, "CUTS", _lanes.CUTS[:1])
    assert counts_of(RECURRENT, block()).calls > QUESTIONS * ENDINGS / BATCH


@pytest.mark.parametrize("lm", [RECURRENT, GROWING])
@pytest.mark.parametrize("call", [1, 1 << 12])
def test_what_is_shared_is_read_again_where_a_call_costs_more(lm, call):
    """Cheap calls read each token once; dear ones read all in as few batches as there is room for."""
    asked = block(common=3)
    engine = Engine(lm, Policy(batch_size=BATCH, costs=Costs(call=call, reach=4096)))
    engine.score(asked)
    if call == 1:
        assert engine.counts.tokens <= 1.02 * distinct(asked)
    else:
        assert engine.counts.calls <= 20


# ------------------------------------------------------------------------------------------------ batches

lengths_of = st.lists(st.integers(1, 30), min_size=1, max_size=7)


@settings(max_examples=60)
@given(lengths_of, st.integers(1, 4), st.integers(20, 90), st.integers(1, 40), st.data())
def test_sequences_are_padded_as_costs_least(lengths, rows, tokens, call, data):
    lengths = sorted(lengths, reverse=True)
    firsts = [data.draw(st.integers(0, length)) for length in lengths]
    logits = data.draw(st.integers(1, 60))

    def cost(parts):
        total = 0
        for part in parts:
            width = lengths[part[0]]
            scored = len(part) * (width - min(firsts[index] for index in part))
            fits = len(part) <= rows and len(part) * width <= tokens and scored <= logits
            total += call + len(part) * width if fits or len(part) == 1 else np.inf
        return total

    count = len(lengths)
    cuts = [inner for size in range(count) for inner in combinations(range(1, count), size)]
    every = [[range(a, b) for a, b in zip((0, *inner), (*inner, count), strict=True)] for inner in cuts]
    found = padded_parts(lengths, firsts, Limits(rows, tokens), call, logits)
    assert [index for part in found for index in part] == list(range(count))
    assert cost(found) == min(map(cost, every))


@given(st.integers(0, 6), st.data())
def test_ranges_are_cut_as_costs_least(count, data):
    price = {(a, b): data.draw(st.integers(1, 20)) for a in range(count) for b in range(a + 1, count + 1)}
    found = cheapest_parts(count, lambda begin: np.array([price[begin, end] for end in range(begin + 1, count + 1)], float))
    cuts = [inner for size in range(count) for inner in combinations(range(1, count), size)]
    totals = [sum(price[pair] for pair in zip((0, *inner), (*inner, count), strict=True)) for inner in cuts]
    assert sum(price[part.start, part.stop] for part in found) == min(totals, default=0)


def test_of_plans_that_cost_about_the_same_that_of_the_fewest_calls_is_taken():
    class Plan:
        def __init__(self, tokens, calls):
            self.tokens, self.calls = tokens, calls

    least, fewer, dear = Plan(1000, 10), Plan(1110, 7), Plan(1400, 1)
    assert cheapest([least, fewer, dear], call=32) is fewer
    assert cheapest([least, dear], call=1) is least


@settings(max_examples=60)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=25), st.integers(1, 8), st.integers(8, 200), st.data())
def test_steps_read_every_lane_to_its_end_after_its_parent_and_within_the_limits(lengths, rows, tokens, data):
    parents = [data.draw(st.none() | st.integers(0, number - 1)) if number else None for number in range(len(lengths))]
    lengths = [length or int(parents[number] is not None or number in parents) for number, length in enumerate(lengths)]
    begun = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    limits = Limits(rows, tokens)
    left, fresh = list(lengths), {n for n, parent in enumerate(parents) if parent is None and not begun[n]}
    for members, length in cheapest_steps(lengths, parents, begun, limits):
        assert len(set(members)) == len(members) <= rows_of(length, limits)
        assert len(members) == 1 or length * len(members) <= tokens
        assert len({number in fresh and left[number] == lengths[number] for number in members}) == 1  # none, or all
        assert all(parents[number] is None or not left[parents[number]] for number in members)
        for number in members:
            left[number] -= length
            assert left[number] >= 0
    assert not any(left)


def test_the_steps_of_many_lengths_are_as_many_as_a_logarithm():
    lengths = list(range(1, 33))
    steps = cheapest_steps(lengths, [None] * 32, [True] * 32, Limits(32, 4096))
    assert len(steps) <= 7
    assert len(cheapest_steps([100, 90, 3], [None] * 3, [True] * 3, Limits(32, 4096))) == 3


# -------------------------------------------------------------------------------------- rows that are joined


class Numbered(Functional):
    """Counts its tokens in a number that all rows share."""

    def forward(self, input_ids, state=None):
        hidden, seen = (None, 0) if state is None else state
        logits, hidden = super().forward(input_ids, hidden)
        return logits, (hidden, seen + input_ids.shape[1])


class Counted(Functional):
    """Counts its tokens row by row, and its logits depend on the number."""

    shared = False

    def forward(self, input_ids, state=None):
        hidden, seen = (None, input_ids.new_zeros(len(input_ids))) if state is None else state
        steps = seen[:, None] + 1.0 + torch.arange(input_ids.shape[1])
        if self.shared:
            steps = steps[:1].expand_as(steps)
        logits, hidden = super().forward(input_ids, hidden)
        return logits + steps[..., None].log() * self.head.bias, (hidden, seen + input_ids.shape[1])


class FirstCounts(Counted):
    """Takes the number of the first row for all: right while all rows have read the same number."""

    shared = True


@pytest.mark.parametrize(
    ("kind", "joins"),
    [(Functional, True), (Counted, True), (Growing, False), (Numbered, False), (FirstCounts, False)],
)
def test_rows_at_different_positions_are_joined_only_if_they_continue_alone(kind, joins):
    assert selection(as_model(kind())).joins == joins


@pytest.mark.parametrize("kind", [Counted, FirstCounts, Numbered, Growing])
def test_models_read_the_same_whether_or_not_rows_can_be_joined(kind):
    lm = as_model(kind())
    counts_of(lm, block(seed=1)[:48])


def test_rows_that_are_joined_where_they_cannot_be_give_other_numbers(monkeypatch):
    """So the test before can fail."""
    lm = as_model(FirstCounts())
    select = replace(selection(lm), joins=True)
    for module in ("_engine", "_joined", "_forked"):
        monkeypatch.setattr(f"pytest_lmeval.engine.{module}.selection", lambda lm: select)
    with pytest.raises(AssertionError):
        counts_of(lm, block(seed=1)[:48])


def test_no_more_rows_are_read_than_the_certificate_knows():
    seen = []

    class Watched(Functional):
        def forward(self, input_ids, state=None):
            seen.append(len(input_ids))
            return super().forward(input_ids, state)

    lm = as_model(Watched())
    selection(lm)
    for known, most in ((None, 32), (12, 12), (3, 3)):
        seen.clear()
        Engine(lm, policy_for(lm, structs.replace(certificate(), limit_rows=known))).score(block())
        assert max(seen) == most
