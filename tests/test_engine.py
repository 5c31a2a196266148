"""One engine reads: what its policy allows follows from the certificate, and more than that is refused."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from toys import VOCAB, Forgetful, Functional, Stateless, Stepper

from pytest_lmeval import as_model, load
from pytest_lmeval.engine import Engine, Policy, Prompt, Request, Scored, Windows, policy_for
from pytest_lmeval.engine._tree import tree
from pytest_lmeval.errors import Refused, StreamError, TaskError
from pytest_lmeval.laws._verdict import verdict_of
from pytest_lmeval.records._certificate import Certificate, Counterexample, LawResult

LM, DEMO = as_model(Functional()), load("demo")
LAWS = ["repeat", "isolation", "causality", "prefix", "splits", "steps", "fork", "resume", "rows", "size", "sums"]
BROKEN = (Counterexample({"length": 8}, 1.0, "off by one nat", "replay(...)"),)


def certificate(*broken, multiple=None, stateful=True, **more):
    """Of a model that breaks these laws."""
    laws = {law: LawResult(cases=1, planned=1, counterexamples=BROKEN if law in broken else ()) for law in LAWS}
    verdict = verdict_of(frozenset(broken), stateful=stateful, dtype="float32", multiple=multiple)
    return Certificate(verdict=verdict, dtype="float32", laws=laws, **more)


broken_laws = st.sets(st.sampled_from(LAWS), max_size=3).map(sorted)


# ------------------------------------------------------------------------------------------------ the policy


@pytest.mark.parametrize(
    ("broken", "multiple", "expected"),
    [
        ((), None, {"carry": True, "single": False, "share": True, "decode": True, "batch_size": 8, "chunk_size": 1024}),
        (("splits",), None, {"carry": True, "single": True, "share": False, "decode": True, "chunk_size": 1}),
        (("splits",), 48, {"carry": True, "multiple": 48, "share": True, "decode": False, "chunk_size": 1008}),
        (("splits", "steps"), 64, {"carry": True, "multiple": 64, "share": True, "decode": False, "chunk_size": 1024}),
        (("steps",), None, {"carry": False, "share": False, "decode": False}),
        (("splits", "steps"), None, {"carry": False, "share": False, "decode": False}),
        (("prefix",), None, {"carry": False, "share": False, "decode": False, "batch_size": 1}),
        (("rows",), None, {"carry": True, "share": True, "decode": True, "batch_size": 1}),
        (("fork",), None, {"carry": True, "share": False, "decode": False, "chunk_size": 1024}),
        (("resume", "size"), None, {"carry": True, "share": True, "decode": True}),
        (("splits", "fork"), None, {"carry": True, "single": True, "share": False, "decode": False, "chunk_size": 1}),
    ],
)
def test_what_may_be_done_follows_from_what_is_broken(broken, multiple, expected):
    policy = policy_for(LM, certificate(*broken, multiple=multiple))
    assert {name: getattr(policy, name) for name in expected} == expected


@pytest.mark.parametrize("law", ["causality", "repeat", "isolation", "sums"])
def test_without_the_laws_that_every_number_stands_on_nothing_is_read(law):
    with pytest.raises(Refused, match=r"(?s)off by one nat.*would be wrong, and may look good"):
        policy_for(LM, certificate(law), window=16)


@settings(max_examples=60)
@given(
    broken_laws, st.sampled_from([None, 16]), st.sampled_from([None, 24]), st.sampled_from([None, "unlimited", 32, "lm_eval"])
)
def test_what_a_certificate_allows_the_engine_takes(broken, multiple, longest, window):
    found = certificate(*broken, multiple=multiple, limit_tokens=longest, limit_is_step=bool(longest))
    try:
        policy = policy_for(LM, found, window=window)
    except Refused:
        return
    assert Engine(LM, policy).policy == policy


MORE = [
    ({"broken": ("prefix",)}, {"carry": True}, "to carry its state"),
    ({"broken": ("prefix",)}, {"fork": True}, "to fork its state"),
    ({"broken": ("fork",)}, {"fork": True}, "to fork its state"),
    ({"broken": ("rows",)}, {"batch_size": 2}, "to read rows side by side"),
    ({"broken": ("splits",)}, {"single": False}, "to continue its state by several tokens"),
    ({"broken": ("splits",)}, {"chunk_size": 2}, "exact one token at a time only, and chunk_size=2 was asked for"),
    ({"broken": ("splits",), "multiple": 16}, {"multiple": 8}, "to continue its state after multiples of 8"),
    ({"broken": ("splits",), "multiple": 16}, {"chunk_size": 40}, "in chunks of multiples of 16 only, and chunk_size=40"),
    ({"broken": (), "limit_tokens": 24, "limit_is_step": True}, {"longest": None}, "for steps of more than 24 tokens"),
    ({"broken": (), "limit_tokens": 24, "limit_is_step": True}, {"chunk_size": 25}, "for steps of more than 24 tokens"),
]


@pytest.mark.parametrize(("found", "more", "said"), MORE)
def test_more_than_is_proven_is_refused_by_the_engine_itself(found, more, said):
    found = dict(found)
    policy = policy_for(LM, certificate(*found.pop("broken"), **found))
    Engine(LM, policy)
    with pytest.raises(Refused, match=said):
        Engine(LM, replace(policy, **more))
    Engine(LM, replace(policy, certificate=None, **more))  # on the caller's word


def test_a_text_whose_state_may_not_be_carried_is_read_in_windows_or_not_at_all():
    lm = as_model(Forgetful())
    found, ids = certificate("splits", "steps"), np.arange(100) % VOCAB
    with pytest.raises(Refused, match=r"(?s)off by one nat.*Repair its state, or score it in windows"):
        Engine(lm, policy_for(lm, found)).stream(ids)
    nll = np.concatenate([chunk.nll for chunk in Engine(lm, policy_for(lm, found, window=99)).stream(ids)])
    whole = np.concatenate([chunk.nll for chunk in Engine(LM).stream(ids)])  # the same model, but for its state
    np.testing.assert_allclose(nll, whole, atol=1e-5)


# ------------------------------------------------------------------------------------------------- the steps


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_a_prompt_read_in_parts_gives_the_last_logits_of_the_whole(length, longest, data):
    keep = data.draw(st.none() | st.integers(1, length))
    ids = LM.random_ids(2, length)
    whole, _ = Engine(LM).prefill(ids, keep=keep)
    found, _ = Engine(LM, Policy(longest=longest)).prefill(ids, keep=keep)
    assert found.shape == whole.shape == (2, keep or length, VOCAB)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_a_prompt_read_in_parts_without_its_state_does_not():
    lm = as_model(Forgetful())
    ids = lm.random_ids(1, 40)
    found, whole = (Engine(lm, Policy(longest=longest)).prefill(ids, keep=None)[0] for longest in (10, None))
    assert not torch.allclose(found, whole, atol=1e-3)


@pytest.mark.parametrize("kind", [Functional, Stepper])
def test_decoding_reads_what_was_chosen_from_the_carried_state(kind):
    engine, prompt = Engine(as_model(kind())), LM.random_ids(2, 9)
    logits, state = engine.prefill(prompt)
    token = logits[:, -1].argmax(-1, keepdim=True)
    found = [token, *(next_ids for next_ids, _ in engine.decode(token, state, 6))]
    text = prompt
    for chosen in found:
        assert torch.equal(chosen, Engine(LM).prefill(text)[0][:, -1].argmax(-1, keepdim=True))
        text = torch.cat([text, chosen], dim=1)
    same = [ids for ids, _ in engine.decode(token, engine.prefill(prompt)[1], 3, choose=lambda logits, ids: ids)]
    assert all(torch.equal(ids, token) for ids in same)


@pytest.mark.parametrize("read", ["steps", "decode"])
def test_logits_are_not_held_beside_those_of_the_next_step(read):
    alive, seen = [], []

    class Watched(Functional):
        def forward(self, input_ids, state=None):
            seen.append(sum(held() is not None for held in alive))
            logits, state = super().forward(input_ids, state)
            alive.append(weakref.ref(logits))
            return logits, state

    engine = Engine(as_model(Watched()))
    ids = LM.random_ids(1, 5)
    del alive[:], seen[:]
    if read == "steps":
        for logits, _ in engine.steps(torch.split(ids, 1, dim=1)):
            del logits
    else:
        for _ in engine.decode(ids[:, :1], None, 5):
            pass
    assert seen == [0] * 5


def test_the_hook_is_given_what_each_chunk_was_scored_from():
    caught, ids = [], np.random.default_rng(0).integers(0, VOCAB, 100)
    engine = Engine(LM, Policy(chunk_size=30), on_logits=caught.append)
    for chunk in engine.stream(ids):
        (logits,) = caught
        targets = torch.from_numpy(ids[chunk.start : chunk.end])
        np.testing.assert_allclose(
            torch.nn.functional.cross_entropy(logits[0], targets, reduction="none"), chunk.nll, atol=1e-6
        )
        caught.clear()


# ----------------------------------------------------------------------------------------------- the one door


def test_a_model_without_a_state_goes_through_the_same_door():
    lm = replace(as_model(Stateless(vocab=256)), tokenizer=DEMO.tokenizer)
    engine, ids = Engine(lm), np.arange(50)
    assert sum(len(chunk.nll) for chunk in engine.stream(ids)) == 49
    assert engine.policy.windows.why == "the model has no state to carry"
    whole = sum(chunk.nll.sum() for chunk in Engine(lm, Policy(windows=Windows(50))).stream(ids))
    (scored,) = engine.score([Request(ids, 1)])
    assert -scored.loglikelihood.sum() == pytest.approx(whole, rel=1e-6)
    (answer,) = engine.generate([Prompt(ids, "a", max_tokens=3)])
    assert len(answer.ids) == 3
    assert engine.prefill(lm.random_ids(1, 4))[0].shape == (1, 1, 256)


def test_a_model_of_codebooks_goes_through_the_same_door():
    lm = load("zoo:moshi")
    engine, frames = Engine(lm), lm.random_ids(1, 12)
    assert len(np.concatenate([chunk.nll for chunk in engine.stream(frames[0].T)])) == 12
    logits, state = engine.prefill(frames)
    assert logits.shape[2] == 1
    assert len(list(engine.decode(frames[..., -1:], state, 3))) == 3
    with pytest.raises(StreamError, match="reads frames of codes: it has no prompts"):
        engine.score([Request(np.arange(4), 2)])
    with pytest.raises(StreamError, match="no answers in words"):
        engine.generate([Prompt(np.arange(4), "a", max_tokens=3)])


def test_a_model_without_a_tokenizer_scores_and_does_not_speak():
    engine = Engine(LM)
    assert len(engine.score([Request(np.arange(6), 2)])[0].loglikelihood) == 4
    with pytest.raises(TaskError, match="has no decode"):
        engine.generate([Prompt(np.arange(6), "a", max_tokens=3)])
    with pytest.raises(StreamError, match=f"vocabulary of .* is 0 to {VOCAB - 1}"):
        engine.score([Request(np.array([1, VOCAB]), 1)])


def test_prompts_that_fit_no_step_are_refused_where_they_cannot_be_read_in_several():
    engine = Engine(LM, Policy(single=True, longest=8))
    with pytest.raises(
        Refused, match=r"reads at most 8 tokens at once.*cannot be read in one step, and would be wrong in several"
    ):
        engine.score([Request(np.arange(20), 2)])


class Box:
    """Answers requests, and lets nobody look inside, as a server does: each is read alone."""

    def __init__(self, lm):
        self.alone = Engine(lm, Policy(carry=False, batch_size=1))

    def score(self, requests):
        return [Scored(self.alone.score([request])[0].loglikelihood) for request in requests]

    def generate(self, answers, hear):
        for answer in answers:
            (found,) = self.alone.generate([answer.prompt])
            answer.ids, answer.text, answer.why = found.ids, found.text, found.why


def test_what_only_answers_requests_is_an_executor_too():
    texts = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in ("The first", "The first arg", "Return")]
    here, box = Engine(DEMO), Engine(DEMO, executor=Box(DEMO))
    for ours, theirs in zip(*(engine.score([Request(text, 2) for text in texts]) for engine in (here, box)), strict=True):
        np.testing.assert_allclose(ours.loglikelihood, theirs.loglikelihood, atol=1e-4)
    prompts = [Prompt(text, str(number), max_tokens=9) for number, text in enumerate(texts)]
    said, theirs = ([answer.text for answer in engine.generate(prompts)] for engine in (here, box))
    assert said == theirs
    assert here.counts.tokens
    assert not box.counts.tokens


# --------------------------------------------------------------------------------------------- prompts in the tree


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=8), st.sampled_from([0, 3, 16]))
def test_every_prompt_ends_in_a_leaf_of_its_own_and_no_token_is_invented(prompts, step):
    requests = [Request(np.array(ids), len(ids)) for ids in prompts]
    ends = {}

    def visit(node, before):
        text = [*before, *node.ids.tolist()]
        if not node.children:
            ends[node.owner] = text
        for child in node.children:
            visit(child, text)

    for node in tree(requests, step=step):
        visit(node, [])
    assert ends == dict(enumerate(prompts))


def test_equal_prompts_are_answered_each_by_itself():
    ids = np.frombuffer(b"The first argument is ", np.uint8).astype(np.int64)
    prompts = [Prompt(ids, name, max_tokens=8, temperature=2.0) for name in ("a", "b", "a")]
    first, other, again = (answer.text for answer in Engine(DEMO).generate(prompts))
    assert first == again != other
