"""The laws of a served model: a right server keeps them, and each broken server is found by the law that it breaks."""

import gc

import pytest
import torch
from stub_server import StubServer

import pytest_lmeval
from pytest_lmeval import Refused, policy_for
from pytest_lmeval.laws import probe
from pytest_lmeval.laws._served import LAWS
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.zoo._demo import Demo


@pytest.fixture(scope="module")
def tiny():
    """A model of random weights: what a law is broken by shows on any."""
    torch.manual_seed(0)
    return as_model(Demo(width=32, layers=1, heads=2, hidden=32).eval(), spec="tiny")


@pytest.fixture
def serve(tiny):
    """Start a stub that serves the tiny model, and load what it serves."""
    running = []

    def start(kind="vllm", concurrency=4, precision="@fp32", **options):
        running.append(StubServer(tiny, kind, **options).__enter__())
        return load(running[-1].spec.removesuffix("@fp32") + precision, concurrency=concurrency)

    yield start
    gc.collect()
    for server in running:
        server.__exit__()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_right_server_keeps_every_law(serve, kind):
    found = probe(serve(kind, longest=160))
    assert found.verdict == "stateless", found
    assert set(found.certificate.with_status("kept")) == set(LAWS)
    assert "as float32 allows" in found.certificate.reference
    assert found.certificate.rounding < 1e-4


@pytest.mark.parametrize(
    ("fault", "law", "verdict"),
    [
        ("neighbours", "batch", "inexact"),
        ("stale-cache", "cache", "inexact"),
        ("leaks", "order", "inexact"),
        ("decode", "decode", "inexact"),
        ("chunks", "chunks", "length-dependent"),
        ("noise", "repeat", "inexact"),
    ],
)
def test_each_broken_variant_is_found_by_the_law_that_it_breaks(serve, fault, law, verdict):
    found = probe(serve(faults=[fault], longest=160, delay=0.01 if fault == "neighbours" else 0))
    assert found.verdict == verdict
    assert law in found.certificate.broken
    assert "times what is allowed" in found.laws[law].counterexample
    if fault in ("neighbours", "decode"):
        assert found.certificate.broken <= {law, "chunks"}  # which is tried in a crowd, too


@pytest.mark.parametrize("fault", ["neighbours", "noise", "stale-cache"])
def test_a_server_for_answers_alone_is_tried_by_its_answers(serve, fault):
    right = probe(serve("llamacpp", longest=160))
    assert right.verdict == "stateless"
    assert right.certificate.with_status("not applicable") == ["decode", "chunks"]
    wrong = probe(serve("llamacpp", longest=160, faults=[fault], delay=0.01))
    assert wrong.verdict == "inexact"


def test_a_server_that_states_no_precision_is_measured_by_its_own_noise_and_at_most_consistent(serve):
    found = probe(serve(longest=160, precision=""))
    assert found.verdict == "consistent"
    assert "the server states no precision; repeated readings differ by 0" in found.certificate.reference
    assert found.certificate.dtype == "unknown"


def test_what_is_not_tried_is_not_kept(serve):
    lm = serve(longest=160)
    found = probe(lm, budget=0)
    assert found.verdict == "unproven"
    assert set(found.certificate.with_status("untried")) == set(LAWS)
    alone = probe(serve(longest=160, concurrency=1))
    assert alone.laws["batch"].status == "not applicable"


def test_a_policy_does_what_the_laws_allow(serve):
    lm = serve(faults=["neighbours"], longest=160, delay=0.01)
    assert policy_for(lm, probe(lm).certificate).batch_size == 1
    lm = serve(faults=["noise"], longest=160)
    with pytest.raises(Refused, match=r"Its numbers would be wrong"):
        policy_for(lm, probe(lm).certificate)


def test_verbs_record_the_verdict_on_the_server_and_what_it_is(serve):
    lm = serve(longest=160)
    result = pytest_lmeval.perplexity(lm, list(range(32, 120)) * 6)
    assert result.record.certificate.verdict == "stateless"
    assert result.record.lm.server["server"] == "vLLM 0.0-stub"
    assert result.record.settings["reading"] == "windows"
    assert result.record.certificate.audit is None or result.record.certificate.audit.difference < 1e-4
