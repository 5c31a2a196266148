"""Tasks, chats and long prompts asked of a server go through the same verbs, and a killed run goes on where it was."""

import gc
import json
import re

import pytest
import torch
from reading import texts
from stub_server import StubServer

import pytest_lmeval
from pytest_lmeval import Choices, Generate, Task, policy_for
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.models._servers import _client
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.records._journal import Checkpoints, Saver
from pytest_lmeval.zoo._demo import Demo

pytest_plugins = ["pytester"]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
ROWS = [{"word": word, "number": number} for number, word in enumerate(WORDS)]


def choose(row):
    return Choices(f"The letter after {row['word']} is", [" one", " two", f" {row['word']}"], row["number"] % 3)


def write(row):
    return Generate(f"def {row['word']}(", (row["word"],), ("\n",), 6)


def tiny(seed):
    """A model of random weights that answers otherwise to each prompt."""
    torch.manual_seed(seed)
    module = Demo(width=32, layers=2, heads=2, hidden=64).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.mul_(1 if "embed" in name else 6)
    return as_model(module, spec=f"tiny-{seed}")


@pytest.fixture(scope="module")
def model():
    return tiny(0)


@pytest.fixture
def serve(model):
    running = []

    def start(kind="vllm", **options):
        running.append(StubServer(model, kind, longest=400, **options).__enter__())
        return running[-1]

    yield start
    gc.collect()
    for server in running:
        server.__exit__()


@pytest.mark.parametrize("ask", [choose, write], ids=["choices", "answers"])
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_task_has_the_answers_that_the_model_gives_here(serve, model, kind, ask):
    asked = Task("letters", ROWS, ask)
    ours, theirs = (measure_task(lm, asked) for lm in (load(serve(kind).spec), model))
    for one, other in zip(ours.examples, theirs.examples, strict=True):
        assert one.output == other.output
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-4)
    assert {name: float(value) for name, value in ours.record.metrics.items()} == pytest.approx(
        {name: float(value) for name, value in theirs.record.metrics.items()}, abs=1e-4
    )


def test_an_interrupted_task_goes_on_where_it_was(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(_client, "ATTEMPTS", 1)
    server, kept = serve(), tmp_path / "kept.jsonl"
    lm, asked = load(server.spec, concurrency=1), Task("letters", ROWS, choose)
    server.asked.clear()
    original = server.scored
    server.scored = lambda ids: (_ for _ in ()).throw(ConnectionError) if len(server.asked) > 12 else original(ids)
    with pytest.raises(pytest_lmeval.ServerError):
        measure_task(lm, asked, kept=kept)
    before = len(server.asked)
    assert sum(len(json.loads(line)["scored"]) for line in kept.read_text().splitlines()) == before - 1 == 12
    server.scored = original
    server.asked.clear()
    again = measure_task(lm, asked, kept=kept)
    whole = measure_task(lm, asked)
    assert [one.loglikelihoods for one in again.examples] == [one.loglikelihoods for one in whole.examples]
    server.asked.clear()
    assert measure_task(lm, asked, kept=kept).resumed == len(ROWS)


@pytest.mark.parametrize("as_stream", [True, False])
def test_an_interrupted_text_goes_on_where_it_was(serve, tmp_path, monkeypatch, as_stream):
    monkeypatch.setattr(_client, "ATTEMPTS", 1)
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    monkeypatch.setattr(Saver, "SHARE", 0.0)
    server = serve()
    lm, text = load(server.spec, concurrency=1), texts(*(f"{word} is a letter. " * 5 for word in WORDS), as_stream=as_stream)
    options = {
        "policy": policy_for(lm, window=40, overlap=10, batch_size=2),
        "checkpoints": Checkpoints(tmp_path),
        "key": "one",
    }
    original = server.scored
    server.asked.clear()
    server.scored = lambda ids: (_ for _ in ()).throw(ConnectionError) if len(server.asked) > 17 else original(ids)
    with pytest.raises(pytest_lmeval.ServerError):
        measure_perplexity(lm, text, **options)
    server.scored = original
    resumed = measure_perplexity(lm, text, **options)
    whole = measure_perplexity(lm, text, policy=options["policy"])
    assert resumed.resumed_at > 0
    assert resumed.tokens == whole.tokens
    assert resumed.nll == pytest.approx(whole.nll, abs=1e-9)


def test_answers_of_another_model_at_the_address_are_not_taken_for_those_of_this_one(serve, model, tmp_path):
    server, kept, asked = serve("llamacpp"), tmp_path / "kept.jsonl", Task("letters", ROWS, write)
    lm = load(server.spec)
    certificate = pytest_lmeval.equivalence(lm).certificate
    first = measure_task(lm, asked, policy=policy_for(lm, certificate), kept=kept)
    server.lm = tiny(1)
    with pytest.warns(UserWarning, match="are not what it answers now"):
        second = measure_task(lm, asked, policy=policy_for(lm, certificate), kept=kept)
    assert [one.output for one in first.examples] != [one.output for one in second.examples]


def test_generated_answers_are_read_back_and_a_server_that_decodes_otherwise_is_refused(serve):
    asked = Task("letters", ROWS, write)
    lm = load(serve().spec)
    policy = policy_for(lm, pytest_lmeval.equivalence(lm).certificate)
    audit = measure_task(lm, asked, policy=policy).record.certificate.audit
    assert audit.answers >= 2
    assert audit.difference < 1e-4
    wrong = load(serve(faults=["decode"]).spec)
    with pytest.raises(pytest_lmeval.Refused, match=r"was read again, whole and alone(.|\n)*The server has other log-prob"):
        measure_task(wrong, asked, policy=policy)


@pytest.mark.parametrize("kind", ["vllm", "llamacpp", "openai"])
def test_stops_and_judges_end_an_answer_of_a_server_as_they_end_one_here(serve, model, kind):
    judged = Task("letters", ROWS, write, judge=lambda text: True if len(text) >= 3 else None)
    ours, theirs = (measure_task(lm, judged) for lm in (load(serve(kind).spec), model))
    assert [one.judged for one in ours.examples] == [one.judged for one in theirs.examples]
    if kind != "openai":
        assert [one.output for one in ours.examples] == [one.output for one in theirs.examples]


def test_a_run_asks_the_server_of_the_command_line_and_records_what_it_is(serve, pytester):
    server = serve()
    pytester.makepyfile(
        """
        from pytest_lmeval import Generate, Task

        def ask(row):
            return Generate(row["text"], ("x",), max_tokens=3)

        def test_served(lm, lmeval):
            assert lmeval.task(lm, Task("own", [{"text": "ab"}, {"text": "cd"}], ask)).record.lm.server["model"] == "stub"
        """
    )
    options = ["--lm", server.spec, "--lmeval-concurrency", "3", "-p", "no:cacheprovider", "-W", "error"]
    result = pytester.runpytest_subprocess(*options)
    result.assert_outcomes(passed=1)
    (record,) = (
        one for one in json.loads((pytester.path / ".lmeval/metrics.json").read_text())["records"] if one["kind"] == "task"
    )
    assert record["lm"]["server"]["server"] == "vLLM 0.0-stub"
    assert record["lm"]["form"] == "served by vLLM 0.0-stub"
    assert record["certificate"]["verdict"] == "stateless"
    assert server.most_under_way <= 3
    result = pytester.runpytest_subprocess("--lm", "server:nowhere", "-p", "no:cacheprovider")
    result.stderr.re_match_lines([re.escape("ERROR: --lm: server:nowhere: 'nowhere' is no address of a server") + ".*"])
