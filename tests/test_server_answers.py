"""A server's answers, and its facts of itself, are checked: one that cannot be right is refused in words, and never counted."""

import numpy as np
import pytest
from stub_server import KINDS, stubs

from pytest_lmeval import Engine, ModelError, NotFiniteError, ServerError, SpecError
from pytest_lmeval.engine import Prompt
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._servers import _client
from pytest_lmeval.models._sources import load

PROMPT = Prompt(np.array(list(b"import ")), "row", 6)


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def serve(demo, monkeypatch):
    monkeypatch.setattr(_client, "FIRST_PAUSE", 0.01)
    with stubs(demo) as start:
        yield start


def put(found, name, value):
    """Put a value where a server of any kind says it."""
    choice = found["choices"][0] if "choices" in found else found
    if name == "text":
        choice["content" if "content" in choice else "text"] = value
    elif name == "end" and "meta_info" in found:
        found["meta_info"]["finish_reason"] = {"type": value}
    elif name == "end":
        choice["stop_type" if "stop_type" in choice else "finish_reason"] = value
    elif "meta_info" in found:
        found["meta_info"]["output_token_logprobs"][1][name == "id"] = value
        found["output_ids"][1] = value if name == "id" else found["output_ids"][1]
    elif "tokens" in found:
        found["completion_probabilities"][1][name] = value
        found["tokens"][1] = value if name == "id" else found["tokens"][1]
    elif name == "id":
        choice["token_ids"][1] = value
    else:
        choice["logprobs"]["token_logprobs"][1] = value
    return found


WRONG = [
    ("text", None, ModelError, "gave None as the text of an answer"),
    ("end", "abort", ModelError, "was not finished, but given up: its finish reason is 'abort'"),
    ("end", "error", ModelError, "its finish reason is 'error'"),
    ("id", 999, ModelError, "generated the id 999, and its tokenizer here has 256 tokens"),
    ("id", -1, ModelError, "generated the id -1"),
    ("id", None, ModelError, "gave an answer that is none to what was asked"),
    ("logprob", float("nan"), NotFiniteError, r"gave nan as the log-probability of token 1 \(id 105\) of an answer"),
    ("logprob", None, NotFiniteError, "gave nan as the log-probability of token 1"),
    ("logprob", 3.0, NotFiniteError, "gave 3.0 as the log-probability of token 1"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_cannot_be_right_is_refused(serve, kind):
    server = serve(kind)
    lm = load(server.spec)
    assert Engine(lm).generate([PROMPT])[0].text
    for name, value, error, said in WRONG:
        if kind == "openai" and name in ("id", "logprob"):  # it tells neither
            continue
        server.altered = lambda payload, found, name=name, value=value: put(found, name, value)
        with pytest.raises(error, match=said):
            Engine(lm).generate([PROMPT])


ONE = {"id": "stub", "owned_by": "someone"}


def test_a_list_of_models_that_is_none_is_refused(serve):
    server = serve("openai")
    for listed in (None, {"a": 1}, [], ["stub"], [{"id": None}], [{"id": 3}]):
        server.described = {"/v1/models": (200, {"data": listed})}
        with pytest.raises(SpecError, match="lists no model, so this is no server of language models"):
            load(server.spec)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_says_something_else_of_itself_is_asked_nonetheless(serve, demo, kind):
    """Some servers answer any path with 200."""
    server, text = serve(kind), Engine(demo).generate([PROMPT])[0].text
    infos = (f"/{get}{what}_info" for get in ("get_", "") for what in ("server", "model"))
    paths = ("/version", "/props", "/metrics", *infos)
    for said in ({"error": "Unexpected endpoint (GET /version)"}, ["x"], "0.32", None):
        server.described = dict.fromkeys(paths, (200, said))
        lm = load(server.spec)
        assert (lm.form == "served by OpenAI-compatible") == (kind == "openai")
        assert Engine(lm).generate([PROMPT])[0].text == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_that_is_no_number_of_tokens_is_not_known(serve, kind):
    server = serve(kind)
    for length in ("512", 0, True):
        server.described = {
            "/v1/models": (200, {"data": [{**ONE, "owned_by": kind, "max_model_len": length}]}),
            "/props": (200, {"default_generation_settings": {"n_ctx": length}}),
            "/get_server_info": (200, {"context_length": length, "chunked_prefill_size": length}),
        }
        lm = load(server.spec)
        assert lm.context_length is None
        assert lm.served.facts.chunk is None


def test_the_precision_that_a_server_says_is_one_that_torch_has(serve):
    server = serve("sglang")
    for said, dtype in (("half", "float16"), ("auto", ""), ("fp8_e4m3", "")):
        server.described = {"/get_server_info": (200, {"dtype": said})}
        assert load(server.spec.removesuffix("@fp32")).served.facts.dtype == dtype


def test_a_list_of_models_that_cannot_be_had_is_said_so(serve):
    server = serve()
    for answer, error, said in (
        ((401, {"error": "broken"}), ServerError, "answered with 401: .*set LMEVAL_API_KEY"),
        ((404, {}), SpecError, "lists no model"),
        ((500, {"error": "broken"}), ServerError, "answered with 500 after 2 attempts: broken"),
        ((503, {"error": "broken"}), ServerError, "answered with 503 after 2 attempts: broken. It is overloaded, or starts"),
        ((308, {}, {"Location": "https://x/v1"}), ServerError, "308: no message. It sends requests on to https://x/v1: give"),
    ):
        server.described = {"/v1/models": answer}
        with pytest.raises(error, match=said):
            load(server.spec)


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp"])
def test_the_tokenizer_of_a_server_that_tells_no_ids_of_a_text_is_compared_by_an_answer(serve, kind):
    assert load(serve(kind, faults=["no-tokenize"]).spec)
    assert load(serve(kind, faults=["no-tokenize"], longest=40).spec)
    other = serve(kind, faults=["no-tokenize"], altered=lambda payload, found: put(found, "text", "quite another"))
    with pytest.raises(SpecError, match=r"not that of 'stub': the ids of an answer are .* here, and 'quite another' there"):
        load(other.spec)


@pytest.mark.parametrize("faults", [(), ("no-ids",)])
def test_the_tokenizer_of_a_server_that_tells_no_ids_at_all_is_compared_by_the_number_of_tokens(serve, faults):
    def fewer(payload, found):
        if isinstance(payload["prompt"], str) and "~" in payload["prompt"]:
            found["usage"]["prompt_tokens"] -= 1
        return found

    assert load(serve("openai", faults=faults).spec)
    with pytest.raises(SpecError, match="a text of 260 tokens here is 259 tokens there, so its tokenizer is another"):
        load(serve("openai", faults=faults, altered=fewer).spec)


BAD = ("[::1", "host:port", "host:99999", "host:0", "a host:1", "host:1/v1?key=x", "host:1#x")


@pytest.mark.parametrize("url", BAD)
def test_what_is_no_address_is_refused_before_anything_is_asked(url):
    for refuse in (specs.check, load):
        with pytest.raises(SpecError, match=r"is no address of a server; write server:http://HOST:PORT"):
            refuse(f"server:http://{url},tokenizer=bytes")


def test_the_address_of_an_endpoint_is_that_of_its_server(serve):
    url = serve().url
    for path in ("/", "/v1", "/v1/", "/v1/models", "/v1/completions", "/v1/chat/completions"):
        assert load(f"server:{url}{path},tokenizer=bytes@fp32").served.client.url == url


def test_what_no_server_can_do_is_refused(serve):
    spec = serve().spec
    for number in (0, -1):
        with pytest.raises(SpecError, match=f"concurrency={number}; a server is asked at least 1 request at once"):
            load(spec, concurrency=number)
    for source in (spec.removesuffix("@fp32"), "vllm:somewhere"):
        for given, bits in ((f"{source}@int8", None), (source, 8)):
            with pytest.raises(SpecError, match="Weights are not packed there: leave @int8 out"):
                specs.parse(given, bits)
    with pytest.raises(SpecError, match=r"there is no folder \./tests_ .*Did you mean tests\?"):
        load(spec.replace("tokenizer=bytes", "tokenizer=./tests_"))
