"""The engine: what its policy allows follows from the certificate, and it refuses more."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from msgspec import structs
from reading import CHEAP, ids_of, nll_of
from tiny_models import VOCAB, Forgetful, Functional, Growing, Stateless, Stepper

from pytest_lmeval import as_model, load
from pytest_lmeval.engine import Engine, Policy, Prompt, Request, Results, Scored, Windows, _losses, _state_rows, policy_for
from pytest_lmeval.engine._joined import Joined
from pytest_lmeval.engine._memory import row_bytes
from pytest_lmeval.engine._prefix_cache import PrefixCache
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.errors import Refused, StreamError, TaskError
from pytest_lmeval.laws._run_probe import verdict_of
from pytest_lmeval.records._certificate import Certificate, Counterexample, LawResult

LM, DEMO = as_model(Functional()), load("demo")
LAWS = ["repeat", "isolation", "causality", "prefix", "splits", "steps", "fork", "resume", "rows", "size", "sums"]
BROKEN = (Counterexample({"length": 8}, 1.0, "off by one nat", "replay(...)"),)


def certificate(*broken, multiple=None, stateful=True, **more):
    """The certificate of a model that breaks these laws."""
    laws = {law: LawResult(cases=1, counterexamples=BROKEN if law in broken else ()) for law in LAWS}
    verdict = verdict_of(frozenset(broken), stateful=stateful, dtype="float32", multiple=multiple)
    return Certificate(verdict=verdict, dtype="float32", laws=laws, **more)


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
def test_the_policy_follows_from_the_broken_laws(broken, multiple, expected):
    policy = policy_for(LM, certificate(*broken, multiple=multiple))
    assert {name: getattr(policy, name) for name in expected} == expected


@pytest.mark.parametrize("law", ["causality", "repeat", "isolation", "sums"])
def test_without_the_laws_that_every_number_needs_nothing_is_read(law):
    with pytest.raises(Refused, match=r"(?s)off by one nat.*would be wrong, and may look good"):
        policy_for(LM, certificate(law), window=16)


class Spy(Functional):
    """Records of each step the rows, the tokens before it, and its tokens."""

    def __init__(self):
        super().__init__(vocab=256)
        self.steps = []

    def forward(self, input_ids, state=None):
        hidden, seen = (None, 0) if state is None else (state[0], int(state[1]))
        self.steps.append((input_ids.shape[0], seen, input_ids.shape[1]))
        logits, hidden = super().forward(input_ids, hidden)
        return logits, (hidden, torch.tensor(seen + input_ids.shape[1]))


SPY = replace(as_model(Spy()), tokenizer=DEMO.tokenizer)
TEXT = np.array(list(b"a prefix of several prompts, and not a short one: "))
PROMPTS = [np.concatenate([TEXT, np.arange(n, n + 9)]) for n in (1, 2, 3)]


@settings(max_examples=40)
@given(
    st.sets(st.sampled_from(LAWS), max_size=3).map(sorted),
    st.sampled_from([None, 6]),
    st.sampled_from([None, 4, 8, 70]),
    st.sampled_from([None, "unlimited", 32]),
)
def test_no_step_exceeds_the_certificate_whatever_is_read(broken, multiple, longest, window):
    found = certificate(*broken, multiple=multiple, limit_tokens=longest, limit_is_step=bool(longest))
    meaningless = set(broken) & {"causality", "repeat", "isolation", "sums"}
    inexact = set(broken) & {"prefix", "splits", "steps"}
    try:
        engine = Engine(SPY, policy_for(SPY, found, window=window))
    except Refused:
        assert meaningless or (window == 32 and longest in (4, 8) and inexact)  # a window is read in one step then
        return
    assert not meaningless
    selection(SPY)  # takes steps of its own, once
    for reading in (
        lambda: list(engine.stream(np.concatenate([TEXT] * 3))),
        lambda: engine.score([Request(prompt, 52) for prompt in PROMPTS]),
        lambda: engine.generate([Prompt(prompt, str(number), max_tokens=4) for number, prompt in enumerate(PROMPTS)]),
    ):
        SPY.module.steps.clear()
        try:
            reading()
        except Refused:
            assert inexact
        for rows, before, length in SPY.module.steps:
            assert length <= (longest or length)
            assert rows == 1 or not set(broken) & {"rows", "prefix"}
            if before and found.multiple:
                assert before % found.multiple == 0
            elif before:
                assert inexact <= {"splits"}
                assert length == 1 or not inexact


def test_a_law_that_cannot_be_tested_or_was_not_tried_allows_nothing():
    laws = {"fork": "its state cannot be forked (no copies)", "rows": "it reads single rows"}
    untestable = {law: LawResult(cases=0, unavailable=why) for law, why in laws.items()}
    found = certificate()
    policy = policy_for(LM, structs.replace(found, laws={**found.laws, **untestable}))
    assert (policy.fork, policy.share, policy.batch_size, policy.carry) == (False, False, 1, True)
    assert policy.sharing == "prefix sharing: off (its state cannot be forked (no copies))"
    late = {law: LawResult(cases=0, missing="nothing was tried") for law in laws}
    policy = policy_for(LM, structs.replace(found, laws={**found.laws, **late}))
    assert (policy.share, policy.batch_size, policy.carry) == (False, 1, True)


def test_an_exact_multiple_larger_than_a_step_carries_nothing():
    step_of_40 = {"limit_tokens": 40, "limit_is_step": True}
    policy = policy_for(LM, certificate("splits", multiple=64, **step_of_40))
    assert (policy.carry, policy.share, policy.decode) == (False, False, False)
    with pytest.raises(Refused, match=r"exact-multiple-of-64(?s:.*)would be wrong, and may look good"):
        Engine(LM, policy).stream(np.arange(9))
    assert policy_for(LM, certificate("splits", multiple=16, **step_of_40), chunk_size=100).chunk_size == 32


STEP_OF_24 = {"limit_tokens": 24, "limit_is_step": True}
MORE = [
    (("prefix",), {}, {"carry": True}, "to carry its state"),
    (("prefix",), {}, {"fork": True}, "to fork its state"),
    (("fork",), {}, {"fork": True}, "to fork its state"),
    (("resume",), {}, {"resume": True}, "to resume from a saved state"),
    (("rows",), {}, {"batch_size": 2}, "to read 2 rows at once"),
    (("splits",), {}, {"single": False}, "to continue its state by several tokens"),
    (("splits",), {}, {"chunk_size": 2}, "exact one token at a time only, and chunk_size=2 was asked for"),
    (("steps",), {}, {"windows": Windows(99), "chunk_size": 9}, "Chunks of 9 carry its state through windows of 99"),
    (("splits",), {"multiple": 16}, {"multiple": 8}, "to continue its state after multiples of 8"),
    (("splits",), {"multiple": 16}, {"chunk_size": 40}, "in multiples of 16 only, and chunk_size=40"),
    ((), STEP_OF_24, {"longest": None}, "for steps of more than 24 tokens"),
    ((), STEP_OF_24, {"chunk_size": 25}, "reads at most 24 tokens in a step, and chunk_size=25"),
]


@pytest.mark.parametrize(("broken", "found", "more", "message"), MORE)
def test_the_engine_refuses_more_than_the_certificate_allows(broken, found, more, message):
    policy = policy_for(LM, certificate(*broken, **found))
    Engine(LM, policy)
    with pytest.raises(Refused, match=message):
        Engine(LM, replace(policy, **more))
    if set(more) <= {"carry", "fork", "resume", "batch_size", "multiple", "longest"}:
        Engine(LM, replace(policy, certificate=None, **more))  # nothing was probed


def test_a_text_whose_state_may_not_be_carried_is_refused_and_read_in_windows_only_if_asked():
    limited = replace(LM, context_length=24)
    assert policy_for(limited, certificate()).windows == Windows(24, 12, why="the model's context is 24 tokens")
    with pytest.raises(Refused, match="score it in windows"):
        Engine(limited, policy_for(limited, certificate("prefix"))).stream(np.arange(9))
    lm = as_model(Forgetful())
    found, ids = certificate("splits", "steps"), np.arange(100) % VOCAB
    with pytest.raises(Refused, match=r"(?s)off by one nat.*Repair its state, or score it in windows"):
        Engine(lm, policy_for(lm, found)).stream(ids)
    nll = nll_of(Engine(lm, policy_for(lm, found, window=99)).stream(ids))
    np.testing.assert_allclose(nll, nll_of(Engine(LM).stream(ids)), atol=1e-5)  # the same model, but for its state


# ------------------------------------------------------------------------------------------------- the steps


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_a_prompt_read_in_parts_gives_the_last_logits_of_the_whole(length, longest, data):
    keep = data.draw(st.none() | st.integers(1, length))
    ids = LM.random_ids(2, length)
    whole, _ = Engine(LM).prefill(ids, keep=keep)
    found, _ = Engine(LM, Policy(longest=longest)).prefill(ids, keep=keep)
    assert found.shape == whole.shape == (2, keep or length, VOCAB)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Functional, Stepper])
def test_decoding_reads_the_chosen_tokens_from_the_carried_state(kind):
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


@pytest.mark.parametrize("read", [lambda e, ids: e.steps(ids.split(1, dim=1)), lambda e, ids: e.decode(ids[:, :1], None, 5)])
def test_logits_are_freed_before_the_next_step(read):
    alive, seen = [], []

    class Watched(Functional):
        def forward(self, input_ids, state=None):
            seen.append(sum(logits() is not None for logits in alive))
            logits, state = super().forward(input_ids, state)
            alive.append(weakref.ref(logits))
            return logits, state

    engine = Engine(as_model(Watched()))
    ids = LM.random_ids(1, 5)
    del alive[:], seen[:]
    for found in read(engine, ids):
        del found
    assert seen == [0] * 5


def test_on_logits_gets_the_logits_that_each_chunk_was_scored_from():
    caught, ids = [], ids_of(100)
    for chunk in Engine(LM, Policy(chunk_size=30), on_logits=caught.append).stream(ids):
        targets = torch.from_numpy(ids[chunk.start : chunk.end])
        nll = torch.nn.functional.cross_entropy(caught.pop()[0], targets, reduction="none")
        np.testing.assert_allclose(nll, chunk.nll, atol=1e-6)
        assert not caught


# ------------------------------------------------------------------------------------------- forms of models


def test_a_model_without_a_state_is_read_by_the_same_methods():
    lm = replace(as_model(Stateless(vocab=256)), tokenizer=DEMO.tokenizer)
    engine, ids = Engine(lm), np.arange(50)
    assert sum(len(chunk.nll) for chunk in engine.stream(ids)) == 49
    assert engine.policy.windows.why == "the model has no state to carry"
    whole = nll_of(Engine(lm, Policy(windows=Windows(50))).stream(ids)).sum()
    (scored,) = engine.score([Request(ids, 1)])
    assert -scored.loglikelihood.sum() == pytest.approx(whole, rel=1e-6)
    (answer,) = engine.generate([Prompt(ids, "a", max_tokens=3)])
    assert len(answer.ids) == 3
    assert engine.prefill(lm.random_ids(1, 4))[0].shape == (1, 1, 256)


def test_a_model_of_codebooks_is_read_by_the_same_methods():
    lm = load("zoo:moshi")
    engine, frames = Engine(lm), lm.random_ids(1, 12)
    assert len(nll_of(engine.stream(frames[0].T))) == 12
    logits, state = engine.prefill(frames)
    assert logits.shape[2] == 1
    assert len(list(engine.decode(frames[..., -1:], state, 3))) == 3
    with pytest.raises(StreamError, match="reads frames of codes: it has no prompts"):
        engine.score([Request(np.arange(4), 2)])
    with pytest.raises(StreamError, match="no answers in words"):
        engine.generate([Prompt(np.arange(4), "a", max_tokens=3)])


def test_a_model_without_a_tokenizer_scores_and_does_not_generate():
    engine = Engine(LM)
    assert len(engine.score([Request(np.arange(6), 2)])[0].loglikelihood) == 4
    with pytest.raises(TaskError, match="has no decode"):
        engine.generate([Prompt(np.arange(6), "a", max_tokens=3)])
    with pytest.raises(StreamError, match=f"vocabulary of .* is 0 to {VOCAB - 1}"):
        engine.score([Request(np.array([1, VOCAB]), 1)])


def test_prompts_longer_than_a_step_are_refused_unless_several_steps_are_exact():
    message = r"reads at most 8 tokens in a step, and \d+ were given; several steps would read them wrongly"
    for policy in (Policy(single=True, longest=8), Policy(carry=False, longest=8), Policy(multiple=9, longest=8)):
        engine = Engine(SPY, policy)
        with pytest.raises(Refused, match=message):
            engine.score([Request(np.arange(20), 2)])
        with pytest.raises(Refused, match=message):
            engine.generate([Prompt(np.arange(20), "a", max_tokens=2)])
        assert len(engine.score([Request(np.arange(8), 2)])[0].loglikelihood) == 6
    assert len(Engine(SPY, Policy(longest=8)).score([Request(np.arange(20), 2)])[0].loglikelihood) == 18


def test_a_state_is_continued_only_as_the_policy_allows():
    ids = SPY.random_ids(1, 12)
    _, state = Engine(SPY).prefill(ids)
    with pytest.raises(Refused, match=r"would be continued by 12 token"):
        Engine(SPY, Policy(single=True)).prefill(ids, state)
    with pytest.raises(Refused, match="would be continued by 1 token"):
        Engine(SPY, Policy(carry=False)).prefill(ids[:, :1], state)
    for policy in (Policy(carry=False), Policy(multiple=4)):
        with pytest.raises(Refused, match="continued token by token"):
            list(Engine(SPY, policy).decode(ids[:, :1], state, 1))
    multiples = Engine(SPY, Policy(multiple=4, chunk_size=8))
    assert list(multiples.stream(ids[0, -1:], state=state, position=5)) == []  # 5 is no multiple, and nothing follows
    with pytest.raises(Refused, match="would be wrong"):
        list(multiples.stream(ids[0], state=state, position=5))
    with pytest.raises(Refused, match="would be wrong"):
        list(Engine(SPY, Policy(carry=False, windows=Windows(64))).stream(ids[0], state=state, position=5))


def test_a_policy_that_contradicts_itself_is_refused():
    with pytest.raises(Refused, match="reads at most 8 tokens in a step, and chunk_size=9"):
        Engine(LM, Policy(longest=8, chunk_size=9))
    with pytest.raises(Refused, match="Chunks of 10 carry its state through windows of 99"):
        Engine(as_model(Stateless()), Policy(windows=Windows(99), chunk_size=10))
    with pytest.raises(Refused, match="has no state to carry: it can only be read in windows"):
        Engine(as_model(Stateless()), Policy()).stream(np.arange(9))
    assert Engine(LM, Policy(longest=20)).chunk_size == 20
    assert Engine(LM, Policy(single=True)).chunk_size == 1
    assert Engine(LM, Policy(multiple=48)).chunk_size == 1008
    for wrong in ({"longest": 0}, {"multiple": 0}, {"chunk_size": 0}, {"batch_size": -1}):
        with pytest.raises(StreamError, match="at least one"):
            Policy(**wrong)
    with pytest.raises(StreamError, match="window='all' was asked for"):
        policy_for(LM, window="all")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request(np.array([]), 1), r"a request is \[0\] of float64"),
        (lambda: Request([[1, 2]], 1), r"a request is \[1, 2\] of int64"),
        (lambda: Request([[1, 2], [3]], 1), "these are no token ids"),
        (lambda: Request(None, 1), "got NoneType"),
        (lambda: Request([1.5, 2.0], 1), "of float64; expected a row of integer token ids"),
        (lambda: Request([1, 2], 0), "has context_len=0; expected 1 to 2"),
        (lambda: Request([1, 2], 3), "has context_len=3"),
        (lambda: Prompt([], "7", max_tokens=1), r"the prompt of 7 is \[0\]"),
        (lambda: Prompt([1], "7", max_tokens=0), "the prompt of 7 has max_tokens=0"),
        (lambda: Prompt([1], "7", max_tokens=1, temperature=-1.0), "temperature=-1"),
        (lambda: Prompt([1], "7", max_tokens=1, stop="ab"), "stop='ab'"),
        (lambda: Prompt([1], "7", max_tokens=1, stop=("",)), "a tuple of non-empty texts"),
    ],
)
def test_impossible_requests_and_prompts_are_refused_when_they_are_made(make, message):
    with pytest.raises(StreamError, match=message):
        make()


def test_ids_may_be_of_any_type():
    wanted = Engine(LM).score([Request(np.arange(6), 2)])[0].loglikelihood
    for ids in (list(range(6)), range(6), torch.arange(6), np.arange(6, dtype=np.uint8), tuple(range(6))):
        np.testing.assert_array_equal(Engine(LM).score([Request(ids, 2)])[0].loglikelihood, wanted)


def test_an_engine_and_its_states_are_freed_without_a_collection():
    def tensors():
        return sum(type(value) is torch.Tensor for value in gc.get_objects())

    selection(SPY)
    gc.disable()
    try:
        before = tensors()
        engine = Engine(SPY)
        engine.score([Request(prompt, 52) for prompt in PROMPTS])
        assert tensors() > before  # the states after shared prefixes
        del engine
        assert tensors() == before
    finally:
        gc.enable()


def test_a_model_is_identified_once_for_an_engine_and_not_with_every_block(monkeypatch):
    """Which hashes its code and a sample of its weights."""
    seen, identify = [], _state_rows.fingerprint
    monkeypatch.setattr(_state_rows, "fingerprint", lambda lm: seen.append(lm) or identify(lm))
    engine = Engine(as_model(Functional()), Policy(batch_size=4))
    engine.score([Request(ids_of(9), 3)])
    once = len(seen)
    assert 0 < once <= 2
    for _ in range(5):
        engine.score([Request(ids_of(9), 3)])
    assert len(seen) == once


def test_the_states_of_a_batch_are_freed_when_what_continues_them_is_read():
    """Also if one row of them is kept for the next block of requests."""
    alive, rows = [], []

    class Watched(Growing):
        def forward(self, input_ids, state=None):
            rows.append(sum(len(left) for states in alive if (left := states()) is not None))
            logits, state = super().forward(input_ids, state)
            alive.append(weakref.ref(state))
            return logits, state

    engine = Engine(as_model(Watched()), Policy(batch_size=2, costs=CHEAP))
    prompts = [np.full(60, passage) for passage in range(6)]
    requests = [Request(np.concatenate([prompt, ids_of(20, seed=end)]), 60) for prompt in prompts for end in range(3)]
    selection(engine.lm), row_bytes(engine.lm, 1)
    del alive[:], rows[:]
    engine.score(requests[::-1])
    assert len(rows) == 3 * 2
    assert rows[::2] == [0, 0, 0]


@pytest.mark.parametrize("answers", [False, True], ids=["scores", "answers"])
def test_the_states_of_joined_rows_are_freed_when_their_leaves_are_read(monkeypatch, answers):
    """All but the one row that is kept for the next block, and that with the engine, without a collection."""
    alive, rows = [], []

    def held():
        return sum(left.shape[1] for states in alive if (left := states()) is not None)

    class Watched(Functional):
        def forward(self, input_ids, state=None):
            rows.append(held())
            logits, state = super().forward(input_ids, state)
            alive.append(weakref.ref(state))
            return logits, state

    def read():
        """What reads the prompts, after it has read them."""
        engine = Engine(replace(as_model(Watched(vocab=256)), tokenizer=DEMO.tokenizer), Policy(batch_size=2, costs=CHEAP))
        passages = [np.full(60, passage) for passage in range(6)]
        prompts = [np.concatenate([passage, ids_of(20, seed=end)]) for passage in passages for end in range(3)]
        assert selection(engine.lm).joins
        row_bytes(engine.lm, 1)
        del alive[:], rows[:]
        if answers:
            engine.generate([Prompt(ids, str(number), 3) for number, ids in enumerate(prompts)])
        else:
            engine.score([Request(ids, 60) for ids in prompts])
        (executor,) = engine._executors.values()
        assert isinstance(executor, Joined)
        assert executor.prefix_cache.lengths
        return engine

    gc.disable()
    try:
        engine = read()
        assert held() == 0
        assert not answers or 2 in rows[len(rows) // 4 :]  # those of the first answers, when the next are begun
        (executor,) = engine._executors.values()
        kept = [weakref.ref(state.get()) for _, state in executor.prefix_cache._entries]
        del executor
        assert all(state() is not None for state in kept)
        del engine
        assert [state() for state in kept] == [None] * len(kept)
        monkeypatch.setattr(PrefixCache, "settle", lambda self: None)  # then the row that is kept holds the others
        unsettled = read()
        assert held() > 0, unsettled
    finally:
        gc.enable()


def test_a_result_that_is_there_stays_as_it_is_when_its_tokens_are_read_for_others():
    """What was read before memory ran out, in larger batches, has other last bits."""
    text = ids_of(60)
    requests = [Request(text, 20), *(Request(np.concatenate([text, ids_of(20, seed=end)]), 20) for end in range(3))]
    there = Scored(np.linspace(-1, -2, 40), read=7)
    found = Engine(LM).score(requests, Results({0: there}))
    assert found[0].loglikelihood is there.loglikelihood
    assert found[0].loglikelihood[-1] == -2
    for one, other in zip(found[1:], Engine(LM).score(requests)[1:], strict=True):
        np.testing.assert_array_equal(one.loglikelihood, other.loglikelihood)


def test_a_model_that_turns_gradients_on_is_read_without_them():
    class Learning(Functional):
        def forward(self, input_ids, state=None):
            with torch.enable_grad():
                return super().forward(input_ids, state)

    lm = replace(as_model(Learning(vocab=256)), tokenizer=DEMO.tokenizer)
    assert sum(len(chunk.nll) for chunk in Engine(lm).stream(TEXT)) == len(TEXT) - 1
    assert len(Engine(lm).score([Request(TEXT, 2)])[0].loglikelihood) == len(TEXT) - 2
    assert Engine(lm).generate([Prompt(TEXT, "a", max_tokens=2, temperature=1.0)])[0].ids


class Server:
    """Answers each request alone, as a server does."""

    def __init__(self, lm):
        self.alone = Engine(lm, Policy(carry=False, batch_size=1))

    def score(self, requests, results):
        return [Scored(self.alone.score([request])[0].loglikelihood) for request in requests]

    def generate(self, answers, choose, results):
        for answer in answers:
            (found,) = self.alone.generate([answer.prompt])
            answer.ids, answer.text, answer.why = found.ids, found.text, found.why


def test_a_server_may_be_the_executor():
    texts = [list(text) for text in (b"The first", b"The first arg", b"Return")]
    here, server = Engine(DEMO), Engine(DEMO, executor=Server(DEMO))
    for ours, theirs in zip(*(engine.score([Request(text, 2) for text in texts]) for engine in (here, server)), strict=True):
        np.testing.assert_allclose(ours.loglikelihood, theirs.loglikelihood, atol=1e-4)
    prompts = [Prompt(text, str(number), max_tokens=9) for number, text in enumerate(texts)]
    said, theirs = ([answer.text for answer in engine.generate(prompts)] for engine in (here, server))
    assert said == theirs
    assert here.counts.tokens
    assert not server.counts.tokens
    for engine in (here, server):
        (answer,) = engine.generate(prompts[:1], lambda number, text: len(text) > 3 or None)
        assert answer.judged is True


def test_an_executor_that_forgets_a_request_or_leaves_an_answer_unfinished_is_an_error():
    server = Server(DEMO)
    server.score, server.generate = lambda requests, results: [], lambda answers, choose, results: None
    with pytest.raises(StreamError, match="answered 0 of 2 requests"):
        Engine(DEMO, executor=server).score([Request([1, 2], 1), Request([1, 3], 1)])
    with pytest.raises(StreamError, match="left the answer to a unfinished"):
        Engine(DEMO, executor=server).generate([Prompt([1, 2], "a", max_tokens=1)])


def test_equal_prompts_have_their_own_answers():
    prompts = [Prompt(list(b"The first argument is "), name, max_tokens=8, temperature=2.0) for name in ("a", "b", "a")]
    first, other, again = (answer.text for answer in Engine(DEMO).generate(prompts))
    assert first == again != other


# ---------------------------------------------------------------------------------------- scores


def scores_in_float64(logits, targets):
    """The definition, row by row: log(sum(exp(x))) - x_target, and how many ids come before the target."""
    logits = logits.double()
    nll = torch.logsumexp(logits, 1) - logits.gather(1, targets[:, None])[:, 0]
    order = [sorted(range(logits.shape[1]), key=lambda token, x=x: (-x[token], token)) for x in logits.tolist()]
    return nll.numpy(), np.array([ids.index(target) for ids, target in zip(order, targets.tolist(), strict=True)])


@pytest.mark.parametrize("large", [1, 1 << 13])  # vocabulary from which ranks are counted row by row
@settings(max_examples=40)
@given(
    rows=st.integers(1, 7),
    size=st.integers(1, 40),
    at_once=st.integers(1, 100),
    shift=st.sampled_from([0.0, 30.0, -30.0, -60.0, 95.0, -95.0, 3e4]),
    levels=st.sampled_from([1, 2, 1000]),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_losses_and_ranks_are_those_of_their_definition(large, rows, size, at_once, shift, levels, masked, dtype):
    """With ties, with masked-out tokens, and where an exponential would overflow or vanish in float32."""
    noise = torch.Generator().manual_seed(rows * size)
    logits = shift + torch.randint(0, levels, (rows, size), generator=noise) * (8.0 / levels)
    targets = torch.randint(0, size, (rows,), generator=noise)
    if masked:
        logits[:, 1::3] = -torch.inf
    logits = logits.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_losses, "LARGE_VOCABULARY", large)
        patch.setattr(_losses, "LOGITS_AT_ONCE", at_once)
        nll, rank = _losses.score(logits, targets)
    expected_nll, expected_rank = scores_in_float64(logits, targets)
    assert nll.dtype == np.float64
    assert (nll >= 0).all()
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-6, atol=4e-7 * max(1.0, abs(shift)))
    np.testing.assert_array_equal(rank, expected_rank)


@pytest.mark.parametrize("large", [1, 1 << 13])
def test_a_logit_that_is_no_number_gives_a_loss_that_is_none_in_its_row_alone(monkeypatch, large):
    monkeypatch.setattr(_losses, "LARGE_VOCABULARY", large)
    logits = torch.zeros(4, 9)
    logits[0, 2], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    nll, rank = _losses.score(logits, torch.tensor([1, 2, 3, 4]))
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2, 3, 4]), reduction="none")
    np.testing.assert_array_equal(np.isfinite(nll), wanted.isfinite().numpy())
    assert (nll[3], rank.tolist()[1:]) == (pytest.approx(np.log(9)), [0, 3, 4])
