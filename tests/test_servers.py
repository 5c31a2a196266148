"""`server:URL`: what a server gives is what its model gives, through each kind's own way; what is wrong is said, not scored."""

import numpy as np
import pytest
from stub_server import stubs

from pytest_lmeval import Engine, ModelError, NotFiniteError, Refused, ServerError, SpecError, StreamError, policy_for
from pytest_lmeval.engine import Prompt, Request
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._model import Bytes
from pytest_lmeval.models._servers import _client
from pytest_lmeval.models._sources import load

TEXT = list(b"def served(model): return [token for token in model if token]\n" * 3)


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def serve(demo):
    """Start a stub that serves the demo model."""
    with stubs(demo) as start:
        yield start


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(_client, "LONGEST_PAUSE", 0.05)


def requests():
    return [Request(np.array(TEXT[:length]), begin) for length, begin in ((40, 1), (30, 20), (30, 20), (9, 8))]


@pytest.mark.parametrize("kind", ["vllm", "sglang", "openai"])
def test_a_server_scores_as_its_model_does(serve, demo, kind):
    served = load(serve(kind).spec)
    for one, own in zip(Engine(served).score(requests()), Engine(demo).score(requests()), strict=True):
        np.testing.assert_allclose(one.loglikelihood, own.loglikelihood, atol=1e-5)
        assert one.greedy == own.greedy


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp", "openai"])
def test_a_server_answers_as_its_model_does(serve, demo, kind):
    served = load(serve(kind).spec)
    prompts = [Prompt(np.array(list(text)), "row", 12, stop) for text, stop in ((b"import ", ()), (b"for i in ", (":",)))]
    for one, own in zip(Engine(served).generate(prompts), Engine(demo).generate(prompts), strict=True):
        assert (one.text, one.why) == (own.text, own.why)
        if kind != "openai":  # which tells no ids
            assert one.ids == own.ids
            np.testing.assert_allclose(one.logprobs, own.logprobs, atol=1e-5)


def test_equal_requests_are_asked_once_and_many_are_under_way_at_once(serve):
    server = serve(delay=0.05)
    lm = load(server.spec, concurrency=4)
    server.asked.clear()
    Engine(lm).score([Request(np.array(TEXT[: 8 + number // 2]), 4) for number in range(24)])
    assert len(server.asked) == 12
    assert server.most_under_way == 4


def test_an_invariant_policy_asks_one_at_a_time(serve):
    server = serve(delay=0.01)
    lm = load(server.spec, concurrency=4)
    Engine(lm, policy_for(lm, invariant=True)).score(requests())
    assert server.most_under_way == 1


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_text_is_read_in_windows_with_the_losses_of_its_model(serve, demo, kind):
    served = load(serve(kind).spec)
    windows = {"window": 32, "overlap": 8}
    ours, theirs = (measure_perplexity(lm, TEXT, policy=policy_for(lm, **windows)) for lm in (served, demo))
    assert ours.nll == pytest.approx(theirs.nll, abs=1e-6)
    assert ours.tokens == theirs.tokens == len(TEXT) - 1
    assert {k: float(v) for k, v in ours.token_accuracy.items()} == pytest.approx(
        {k: float(v) for k, v in theirs.token_accuracy.items()}
    )
    assert any("windows of 32 tokens" in note for note in ours.record.notes)
    assert ours.record.lm.server["max_length"] == 512


def test_every_choice_of_sampling_is_sent_so_that_no_default_of_the_server_decides(serve):
    server = serve()
    Engine(load(server.spec)).generate([Prompt(np.array(TEXT[:9]), "row", 3)])
    sent = server.asked[-1][1]
    assert {name: sent[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} == {
        "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    assert {"presence_penalty", "frequency_penalty", "seed", "min_tokens", "n"} <= set(sent)


def test_several_answers_to_a_question_are_drawn_apart_and_the_same_again(serve):
    lm = load(serve().spec)
    drawn = [Prompt(np.array(TEXT[:9]), "row", 8, temperature=1.0, repeat=number) for number in range(4)]
    texts, again = ([answer.text for answer in Engine(lm).generate(drawn)] for _ in range(2))
    assert texts == again
    assert len(set(texts)) > 1


@pytest.mark.parametrize("faults", [("no-logprobs",)])
def test_likelihoods_that_a_server_does_not_give_are_refused(serve, faults):
    for server in (serve("llamacpp"), serve("openai", faults=faults)):
        lm = load(server.spec)
        assert Engine(lm).generate([Prompt(np.array(TEXT[:9]), "row", 3)])[0].text
        for work in (lambda lm=lm: Engine(lm).score(requests()), lambda lm=lm: measure_perplexity(lm, TEXT)):
            with pytest.raises(Refused, match="gives no log-probabilities of a prompt"):
                work()


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("zeros", Refused, "exactly 0 as the log-probability of each of 39 tokens"),
        ("nan", NotFiniteError, "gave nan as the log-probability of token 39"),
        ("short", ModelError, "39 prompt_logprobs for 40 tokens"),
        ("first", ModelError, "its first entry is"),
        ("other-ids", ModelError, "in place of"),
        ("no-logprobs", ModelError, "gave an answer that is none to what was asked"),
        ("other-model", ModelError, "came from the model 'another', and 'stub' was asked"),
    ],
)
def test_an_answer_that_cannot_be_right_is_refused(serve, fault, error, said):
    lm = load(serve(faults=[fault]).spec)
    with pytest.raises(error, match=said):
        Engine(lm).score(requests()[:1])


def test_a_server_that_is_busy_or_drops_the_connection_is_asked_again(serve, demo):
    server = serve()
    lm = load(server.spec)
    server.statuses += [429, 503, "drop", 502]
    found = Engine(lm).score(requests())
    np.testing.assert_allclose(found[0].loglikelihood, Engine(demo).score(requests())[0].loglikelihood, atol=1e-5)
    server.statuses += [429] * 40
    with pytest.raises(ServerError, match=r"answered with 429 after 6 attempts: stub says 429. It is overloaded.*kept") as busy:
        Engine(lm).score(requests())
    assert busy.value.status == 429
    server.statuses[:] = ["drop"] * 40
    with pytest.raises(ServerError, match="gave no answer in 6 attempts"):
        Engine(lm).score(requests())


def test_what_was_answered_before_an_error_is_kept(serve):
    from pytest_lmeval.engine import Results

    server = serve()
    lm = load(server.spec, concurrency=1)
    kept = []
    results = Results(keep=lambda new: kept.extend(new))
    many = [Request(np.array(TEXT[: 8 + number]), 4) for number in range(4)]
    Engine(lm).score(many[:2], results)
    server.statuses[:] = [400]
    with pytest.raises(ServerError, match="stub says 400"):
        Engine(lm).score(many, results)
    assert kept == [0, 1]
    server.asked.clear()
    Engine(lm).score(many, results)
    assert len(server.asked) == 2


def test_no_server_and_no_address_are_said_so():
    with pytest.raises(ServerError, match=r"gave no answer in 2 attempts.*Is the server up"):
        load("server:http://127.0.0.1:9,tokenizer=bytes")
    for spec, said in (
        ("server:localhost:8000", "is no address of a server; write server:http://HOST:PORT"),
        ("server:http://me:secret@host:1,tokenizer=bytes", "set LMEVAL_API_KEY"),
    ):
        with pytest.raises(SpecError, match=said) as refused:
            load(spec)
        assert "secret" not in str(refused.value)
        with pytest.raises(SpecError, match=said):
            specs.check(spec)


def test_another_model_or_tokenizer_than_said_is_refused(serve):
    server = serve(name="small-instruct")
    with pytest.raises(SpecError, match=r"asks for the model 'small-instuct', and .* serves small-instruct. Did you mean"):
        load(f"server:{server.url},tokenizer=bytes,model=small-instuct")
    with pytest.raises(SpecError, match="needs the tokenizer of 'small-instruct'"):
        load(f"server:{server.url}")
    with pytest.raises(SpecError, match=r"is not that of 'stub': a text is .* differs from token 0 on"):
        load(serve(faults=["bad-tokenizer"]).spec)
    with pytest.raises(SpecError, match="the option 'tokenizer' is of server or vllm, not of demo"):
        load("demo,tokenizer=bytes")


def test_a_sequence_longer_than_the_context_is_refused_before_it_is_sent(serve):
    server = serve(longest=64)
    lm = load(server.spec)
    assert lm.context_length == 62
    server.asked.clear()
    with pytest.raises(StreamError, match="reads at most 64 tokens, those that it generates included, and 81 were asked for"):
        Engine(lm).score([Request(np.array(TEXT[:80]), 1)])
    assert server.asked == []
    assert measure_perplexity(lm, TEXT).tokens == len(TEXT) - 1  # in windows that fit


def test_text_is_sent_where_ids_are_not_taken_and_only_if_it_is_read_back_as_these_ids(serve, demo):
    server = serve("openai", faults=["no-ids"])
    lm = load(server.spec)
    assert lm.served.facts.text_only
    found, own = (Engine(one).score(requests())[0].loglikelihood for one in (lm, demo))
    np.testing.assert_allclose(found, own, atol=1e-5)
    with pytest.raises(StreamError, match="the text of these 3 tokens is read back as"):
        Engine(lm).score([Request(np.array([200, 201, 202]), 1)])


def test_a_server_that_puts_a_token_before_each_text_is_asked_without_it(serve, demo, monkeypatch):
    server = serve("openai", faults=["no-ids", "adds-bos"])
    with pytest.raises(SpecError, match=r"a text of 24 tokens here is 25 tokens there"):
        load(server.spec)
    monkeypatch.setattr(Bytes, "bos", 0)
    lm = load(server.spec)
    begun = [Request(np.array([0, *TEXT[:20]]), 4)]
    found, own = (Engine(one).score(begun)[0].loglikelihood for one in (lm, demo))
    np.testing.assert_allclose(found, own, atol=1e-5)
    with pytest.raises(StreamError, match=r"puts a token \(id 0\) before each"):
        Engine(lm).generate([Prompt(np.array(TEXT[:9]), "row", 3)])


def test_the_key_of_the_environment_is_sent_and_stands_nowhere(serve, monkeypatch):
    monkeypatch.setenv("LMEVAL_API_KEY", "key-of-mine-123456")
    server = serve()
    lm = load(server.spec)
    result = measure_perplexity(lm, TEXT[:40])
    assert server.keys[-1] == "Bearer key-of-mine-123456"
    assert "key-of-mine" not in repr(result.record) + repr(lm) + repr(lm.served)


def test_a_served_model_cannot_be_stepped(serve):
    lm = load(serve().spec)
    with pytest.raises(Refused, match=r"served by vLLM 0.0-stub, which gives no logits"):
        lm.step(lm.random_ids(1, 4))
