"""Answers of recurrent models in the rows of a batch: as one ends, the next prompt takes its row; the same as one at a time."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tiny_models import Functional, Growing

from pytest_lmeval import as_model, load
from pytest_lmeval.engine import Engine, Policy, Prompt, Results, _row_pool
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.records._certificate import Costs

RECURRENT, GROWING = (as_model(kind(vocab=256, width=24)) for kind in (Functional, Growing))


def engine_with(lm=RECURRENT, *, call=32, **policy):
    selection(lm)  # takes steps of its own, once
    return Engine(lm, Policy(costs=Costs(call=call, reach=0), **policy))


def prompts_of(sizes, shots=0, **options):
    """Prompts of (length, longest answer), after a beginning that they share."""
    rng = np.random.default_rng(0)
    before = rng.integers(256, size=shots)
    return [
        Prompt(np.concatenate([before, rng.integers(256, size=size)]), f"row {number}", most, **options)
        for number, (size, most) in enumerate(sizes)
    ]


def stopping(lm, prompts):
    """The prompts with stops: a character that each alone says somewhere, or none."""
    found = []
    for number, prompt in enumerate(prompts):
        (alone,) = Engine(lm, Policy()).generate([prompt])
        letters = alone.text[number % 3 :][:1]
        found.append(replace(prompt, stop=(letters,) if letters else ()))
    return found


def check(lm, together, prompts):
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = Engine(lm, Policy()).generate([prompt])
        assert (found.ids, found.text, found.why) == (alone.ids, alone.text, alone.why)
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12)


@pytest.mark.parametrize("lm", [RECURRENT, GROWING], ids=["recurrent", "growing"])
@settings(max_examples=25)
@given(
    sizes, st.sampled_from([0, 5, 60]), st.sampled_from([0.0, 0.8]), st.sampled_from([1, 32]), st.integers(1, 4), st.booleans()
)
def test_answers_side_by_side_are_those_of_one_at_a_time(lm, sizes, shots, temperature, call, batch_size, stop):
    prompts = prompts_of(sizes, shots, temperature=temperature)
    prompts = stopping(lm, prompts) if stop else prompts
    engine = engine_with(lm, call=call, batch_size=batch_size)
    together = [*engine.generate(prompts[:5]), *(engine.generate(prompts[5:]) if prompts[5:] else [])]
    check(lm, together, prompts)


@pytest.mark.parametrize("name", ["lstm", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("mamba", "mamba2"))])
def test_models_of_the_zoo_answer_side_by_side(name):
    lm = load(f"zoo:{name}")
    prompts = prompts_of([(1 + 7 * number % 23, 1 + number % 5) for number in range(9)], shots=3)
    engine = engine_with(lm, batch_size=3)
    check(lm, engine.generate(prompts), prompts)


def test_as_an_answer_ends_the_next_prompt_takes_its_row():
    prompts = prompts_of([(11, 40), (10, 2), (10, 2), (10, 2), (10, 2)], shots=100)
    calls = {}
    for lm in (RECURRENT, GROWING):
        engine = engine_with(lm, batch_size=2)
        engine.generate(prompts)
        calls[lm] = engine.counts.calls
    # the examples, the questions, the last token of the longest, and 40 steps in whose other row are all others
    assert calls[RECURRENT] <= 3 + 40
    assert calls[GROWING] > 3 + 40  # batches are of those that began together
    tokens = 100 + 11 + 4 * 10 + 39 + 4 * 1
    engine = engine_with(batch_size=2)
    assert sum(answer.read for answer in engine.generate(prompts)) == tokens == engine.counts.tokens


def test_no_row_stands_empty_while_a_prompt_waits():
    rows = []

    class Watched(Functional):
        def forward(self, input_ids, state=None):
            rows.append(tuple(input_ids.shape))
            return super().forward(input_ids, state)

    engine = engine_with(as_model(Watched(vocab=256)), batch_size=4)
    rows.clear()
    engine.generate(prompts_of([(9, 3 + 5 * (number % 3)) for number in range(16)]))
    steps = [count for count, length in rows if length == 1]
    assert sum(steps) == sum(3 + 5 * (number % 3) for number in range(16))
    assert steps[: steps.index(3)] == [4] * steps.index(3)
    assert len(steps) <= sum(steps) / 4 + 13


def test_a_row_that_is_left_in_the_state_of_another_gives_other_answers(monkeypatch):
    """So the first test can fail."""

    class Wrong:
        def __init__(self, select):
            self.select = select

        def join(self, parts):
            return self.select.join([(state, [0] * len(rows)) for state, rows in parts])

    answer = _row_pool.answer_in_rows
    monkeypatch.setattr(
        "pytest_lmeval.engine._joined.answer_in_rows", lambda engine, select, *rest: answer(engine, Wrong(select), *rest)
    )
    prompts = prompts_of([(5, 9), (12, 2), (7, 9), (20, 9)], temperature=1.0)
    with pytest.raises(AssertionError):
        check(RECURRENT, engine_with(batch_size=2).generate(prompts), prompts)


def test_the_state_before_a_prompt_is_not_written_to():
    """Models may write to the state that they are given; the examples before all prompts are one."""

    class Writing(Functional):
        def forward(self, input_ids, state=None):
            before = None if state is None else state.clone()
            logits, after = super().forward(input_ids, before)
            return logits, after if state is None else state.copy_(after)

    lm = as_model(Writing(vocab=256, width=24))
    prompts = prompts_of([(5, 4), (12, 2), (7, 6), (3, 3), (1, 3)], shots=40)
    engine = engine_with(lm, batch_size=2)
    check(RECURRENT, [*engine.generate(prompts[:3]), *engine.generate(prompts[3:])], prompts)


def test_answers_that_are_there_are_not_generated_again_and_the_others_keep_their_bits():
    prompts = prompts_of([(1 + number % 7, 1 + number % 5) for number in range(40)], temperature=0.8)
    kept = {}
    whole = engine_with(batch_size=4).generate(prompts, results=Results(keep=lambda new: kept.update(copy.deepcopy(new))))
    some = {number: answer for number, answer in kept.items() if number in list(kept)[:16]}
    engine = engine_with(batch_size=4)
    again = engine.generate(prompts, results=Results(some))
    assert [(one.ids, one.logprobs, one.read) for one in again] == [(one.ids, one.logprobs, one.read) for one in whole]
