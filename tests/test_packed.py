"""Packed reading: a whole prefix tree in one row, and answers side by side in one row; the same as each sequence alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_sharing import distinct, requests, worst
from tiny_models import small_transformer as transformer

from pytest_lmeval import as_model, equivalence, load
from pytest_lmeval.engine import Engine, Policy, Prompt, Request, policy_for
from pytest_lmeval.engine._costs import costs_of, power_of_two
from pytest_lmeval.engine._packed import Packed
from pytest_lmeval.errors import ModelError, Refused
from pytest_lmeval.models._model import fork
from pytest_lmeval.records._certificate import Costs
from pytest_lmeval.zoo._transformer import Transformer

LM = as_model(transformer())


def engine_with(lm=LM, *, call=32, reach=4096, **policy):
    """An engine that packs, for a model of these costs."""
    return Engine(lm, Policy(pack=True, costs=Costs(call=call, reach=reach), **policy))


costs = st.builds(dict, call=st.sampled_from([1, 4, 32]), reach=st.sampled_from([0, 1, 16, 4096]))


@settings(max_examples=60)
@given(requests(), costs, st.sampled_from([None, 1, 3, 7]), st.integers(1, 3))
def test_packs_change_no_likelihood_however_the_tree_is_cut(asked, costs, longest, blocks):
    engine = engine_with(**costs, longest=longest)
    for block in np.array_split(np.arange(len(asked)), blocks):
        if len(block):
            assert worst(LM, engine, [asked[number] for number in block]) < 1e-4


def questions(shots, count, *, question=30, ending=6, seed=0):
    """Requests of `count` questions with four choices each, after shared few-shot examples."""
    rng = np.random.default_rng(seed)
    before = rng.integers(256, size=shots)
    found = []
    for _ in range(count):
        asked = np.concatenate([before, rng.integers(256, size=question)])
        found += [Request(np.concatenate([asked, rng.integers(256, size=ending)]), len(asked)) for _ in range(4)]
    return found


def test_every_token_is_read_once_in_calls_of_the_best_size():
    asked = questions(0, 40)
    engine = engine_with()
    assert worst(LM, engine, asked) < 1e-4
    assert engine.counts.tokens == distinct(asked) == 1998  # two are shared by chance
    assert engine.counts.calls == round(2000 / 256)
    assert engine.counts.padding == 0


def test_what_all_blocks_share_is_read_once_and_packs_continue_it():
    asked = questions(400, 40)
    engine = engine_with()
    for begin in range(0, len(asked), 40):
        engine.score(asked[begin : begin + 40])
    assert engine.counts.tokens == distinct(asked) + 3  # shared by chance across blocks
    assert engine.counts.calls == 1 + 4 * 2  # the examples, and two packs in each block


def test_a_passage_whose_questions_two_blocks_share_is_read_once():
    rng = np.random.default_rng(0)
    passage = rng.integers(256, size=150)
    asked = [Request(np.concatenate([passage, rng.integers(256, size=20)]), 169) for _ in range(12)]
    engine = engine_with()
    assert worst(LM, engine, asked[:8]) < 1e-4
    assert worst(LM, engine, asked[8:]) < 1e-4
    assert engine.counts.tokens == 150 + 12 * 19


def test_a_sequence_longer_than_a_pack_is_read_alone_and_few_shared_tokens_with_each_pack():
    rng = np.random.default_rng(1)
    long = Request(rng.integers(256, size=900), 890)
    engine = engine_with()
    assert worst(LM, engine, [long, *questions(3, 30)]) < 1e-4
    packs = round(30 * 50 / (256 - 3))
    assert engine.counts.calls == 1 + packs
    assert engine.counts.tokens == pytest.approx(899 + 30 * 50 + 3 * packs, abs=20)  # some are shared by chance


def test_no_call_scores_more_logits_than_fit():
    sizes = []
    engine = engine_with()
    engine.on_logits = lambda logits: sizes.append(logits.shape[1])
    asked = [*questions(0, 8, ending=20), Request(np.arange(200) % 256, 1)]
    executor = Packed(engine)
    executor.most_logits = 48
    engine.executor = executor
    assert worst(LM, engine, asked) < 1e-4
    assert max(sizes) <= 48


class Misread(Transformer):
    """Reads in one row otherwise than it should; beside the mask and positions as they should be."""

    way = "ignores the mask"

    def packed_step(self, input_ids, state, positions, visible, wanted, more):
        if self.way == "refuses":
            raise ValueError("attention_mask should be [b, t]")
        if self.way == "ignores the mask":
            visible = torch.ones_like(visible).tril(visible.shape[1] - visible.shape[0])
        if self.way == "takes the mask with another sign":
            visible = ~visible | torch.eye(*visible.shape, dtype=torch.bool)
        if self.way == "ignores positions":
            begin = 0 if state is None else state[0].keys.shape[2]
            positions = torch.arange(begin, begin + len(positions))
        if self.way == "sees eight tokens":
            ages = positions[:, None] - torch.cat([torch.arange(visible.shape[1] - len(positions)), positions])
            visible = visible & (ages < 8)
        return super().packed_step(input_ids, state, positions, visible, wanted, more)

    def take_columns(self, state, columns):
        taken = super().take_columns(state, columns)
        return [layer._replace(keys=layer.keys.flip(2)) for layer in taken] if self.way == "takes wrong columns" else taken


WAYS = ["refuses", "ignores the mask", "takes the mask with another sign", "ignores positions", "sees eight tokens",
        "takes wrong columns"]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_misreads_a_pack_is_found_by_the_law_and_read_otherwise(way):
    module = transformer()
    module.__class__, module.way = Misread, way
    lm = as_model(module)
    certificate = equivalence(lm, budget=1).certificate
    assert certificate.verdict == "exact-any-chunk"
    law = certificate.laws["packed"]
    assert law.status == "not applicable"
    assert ("refuses" in way) == ("attention_mask should be [b, t]" in law.unavailable)
    policy = policy_for(lm, certificate)
    assert policy.share
    assert not policy.pack
    engine = Engine(lm, policy)
    assert worst(lm, engine, questions(20, 3)) < 1e-4
    with pytest.raises(Refused, match="to read several sequences in one row, which its certificate does not allow"):
        Engine(lm, replace(policy, pack=True))


def test_a_model_that_keeps_the_law_is_packed_and_its_costs_are_in_the_certificate():
    lm = as_model(transformer())
    certificate = equivalence(lm, budget=1).certificate
    assert certificate.laws["packed"].kept
    assert certificate.costs == costs_of(lm)
    assert policy_for(lm, certificate).pack
    assert not policy_for(lm, certificate, invariant=True).pack
    assert not policy_for(lm).pack  # nothing is proven
    unpacked = replace(lm, step_fn=lambda *given: lm.step_fn(*given))
    assert "packed" not in equivalence(unpacked, budget=1).laws
    with pytest.raises(ModelError, match="does not read several sequences in one row: it has no `packing`"):
        Engine(unpacked, Policy(pack=True)).score(questions(0, 2))


def prompts_of(sizes, shots=0, *, temperature=0.0, seed=0):
    rng = np.random.default_rng(seed)
    before = rng.integers(256, size=shots)
    return [
        Prompt(np.concatenate([before, rng.integers(256, size=size)]), f"row {number}", most, temperature=temperature)
        for number, (size, most) in enumerate(sizes)
    ]


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12)


@settings(max_examples=25)
@given(sizes, st.sampled_from([0, 5, 60]), st.sampled_from([0.0, 0.8]), costs, st.integers(1, 4), st.sampled_from([None, 1, 5]))
def test_answers_side_by_side_are_those_of_one_at_a_time(sizes, shots, temperature, costs, batch_size, longest):
    prompts = prompts_of(sizes, shots, temperature=temperature)
    engine = engine_with(**costs, batch_size=batch_size, longest=longest)
    together = [*engine.generate(prompts[:5]), *(engine.generate(prompts[5:]) if prompts[5:] else [])]
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = Engine(LM, Policy()).generate([prompt])
        assert (found.ids, found.why) == (alone.ids, alone.why)
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_as_an_answer_ends_the_next_prompt_takes_its_place():
    prompts = prompts_of([(10, 40), (10, 2), (10, 2), (10, 2), (10, 2)], shots=100)
    prompts[0].ids[100] = 0  # the first of all, as they are sorted
    engine = engine_with(batch_size=2)
    engine.generate(prompts)
    # the long answer's 40 calls hold all others, and one call the examples
    assert engine.counts.calls == 1 + 40
    assert engine.counts.tokens == 100 + 5 * 10 + 39 + 4 * 1


def test_columns_that_no_answer_sees_are_dropped():
    most = []

    class Watched(Transformer):
        def packed_step(self, input_ids, state, positions, visible, wanted, more):
            most.append(visible.shape[1])
            return super().packed_step(input_ids, state, positions, visible, wanted, more)

    module = transformer()
    module.__class__ = Watched
    engine = engine_with(as_model(module), batch_size=2)
    engine.generate(prompts_of([(10, 10)] * 8))
    assert max(most) <= 2 * 2 * 20


def test_a_long_prompt_is_not_compared_with_the_columns_of_others():
    prompts = prompts_of([(200, 3), (200, 30), (200, 3), (200, 3)])
    apart, together = engine_with(batch_size=2, call=4, reach=4096), engine_with(batch_size=2, call=32, reach=1 << 20)
    for engine in (apart, together):
        engine.generate(prompts)
    assert apart.counts.calls > together.counts.calls
    assert apart.counts.tokens == together.counts.tokens


def test_costs_are_counted_from_what_a_call_does():
    small, large = (costs_of(as_model(transformer(hidden=hidden))) for hidden in (32, 4096))
    assert costs_of(as_model(transformer(hidden=32))) == small
    assert small.call == power_of_two(small.call) == 64  # at most: calls of a small model are mostly overhead
    assert large.call <= 64
    assert 0 < small.reach < large.reach  # of a wide model, little is attention
    assert costs_of(as_model(load("zoo:lstm").module)).reach == 0  # compares no pairs of tokens


def test_a_pack_leaves_the_state_before_it_as_it_was():
    _, state = LM.step(torch.arange(9)[None])
    before = fork(state)
    for more in (False, True):
        ids, positions, visible = torch.arange(4)[None], torch.arange(9, 13), torch.ones(4, 13, dtype=torch.bool).tril(9)
        logits, new = LM.packed_step(ids, fork(state), positions, visible, torch.tensor([3]), more=more)
        assert (new is not None) == more
    assert all(torch.equal(one, other) for a, b in zip(state, before, strict=True) for one, other in zip(a, b, strict=True))
    assert torch.allclose(logits, LM.step(torch.cat([torch.arange(9), torch.arange(4)])[None], keep=1)[0][0], atol=1e-5)
