"""A real vLLM server with a real model: it keeps the laws, and gives what transformers gives for the same weights."""

import gc
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from real_model import MISSING as NO_MODEL, real_model_folder
from real_server import MISSING, ON_CPU, environment, vllm

import pytest_lmeval
from pytest_lmeval import Engine, Generate, Task, policy_for
from pytest_lmeval.engine import Prompt, Request
from pytest_lmeval.measures._agreement import measure_agreement
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.models._sources import load

pytestmark = [pytest.mark.real_server, pytest.mark.thorough]
CLOSE = 1e-3  # nats between two engines in float32
TEXTS = ["The capital of France is Paris, and", "def add(a, b):\n    return", "Once upon a time there was a"]


@pytest.fixture(scope="module")
def folder():
    return real_model_folder() or pytest.skip(NO_MODEL)


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    if environment() is None:
        pytest.skip(MISSING)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with vllm(folder, tmp_path_factory.mktemp("vllm") / "log") as (url, _):
        yield load(f"server:{url}@fp32", concurrency=4)
        gc.collect()


@pytest.fixture(scope="module")
def local(folder):
    return load(f"hf:{folder}@fp32")


def test_it_scores_and_answers_as_transformers_does(served, local):
    encoded = [np.array(local.tokenizer.encode(text)[0]) for text in TEXTS]
    requests = [Request(ids, 1) for ids in encoded]
    for one, other in zip(*(Engine(lm).score(requests) for lm in (served, local)), strict=True):
        np.testing.assert_allclose(one.loglikelihood, other.loglikelihood, atol=CLOSE)
    prompts = [Prompt(ids, str(number), 12, ("\n",)) for number, ids in enumerate(encoded)]
    for one, other in zip(*(Engine(lm).generate(prompts) for lm in (served, local)), strict=True):
        assert (one.text, one.why) == (other.text, other.why)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=CLOSE)


def test_it_keeps_the_laws_and_a_chat_is_answered_and_read_back(served):
    found = pytest_lmeval.equivalence(served, longest=128)
    assert found.certificate.broken == frozenset()
    rows = [{"text": f"What is {number} plus one?"} for number in range(4)]
    asked = Task("sums", rows, lambda row: Generate(row["text"], ("x",), max_tokens=8))
    result = measure_task(served, asked, policy=policy_for(served, found.certificate), chat=True)
    assert result.record.certificate.audit.answers >= 2
    assert result.record.certificate.audit.difference < CLOSE


def test_drawn_answers_have_the_log_probabilities_of_the_model_whatever_the_temperature(served, local):
    ids = np.array(local.tokenizer.encode(TEXTS[2])[0])
    drawn = [Prompt(ids, "row", 10, temperature=1.5, top_p=0.9, repeat=number) for number in range(3)]
    answers, again = Engine(served).generate(drawn), Engine(served).generate(drawn)
    assert [one.ids for one in answers] == [one.ids for one in again]
    assert len({one.text for one in answers}) > 1
    for one in answers:
        read = Engine(local).score([Request(np.concatenate([ids, one.ids]), len(ids))])[0]
        np.testing.assert_allclose(one.logprobs[: len(one.ids)], read.loglikelihood, atol=CLOSE)


def test_vllm_in_its_own_process_scores_as_transformers_does(folder, local):
    """This package is imported in vLLM's environment, where its dependencies have to be, too."""
    python = (environment() or pytest.skip(MISSING)) / "bin" / "python"
    needed = "import hypothesis, datasets, lazy_loader, tenacity, pytest"
    if subprocess.run([python, "-c", needed], capture_output=True).returncode:
        pytest.skip("LMEVAL_VLLM_ENV lacks what this package depends on")
    ids = local.tokenizer.encode(TEXTS[0])[0].tolist()
    script = f"""
import json, torch
from pytest_lmeval.engine import Engine, Request
from pytest_lmeval.models._servers._vllm_here import load
if __name__ == "__main__":
    lm = load({str(folder)!r}, spec="vllm", dtype=torch.float32, length=512)
    print("FOUND", json.dumps(Engine(lm).score([Request({ids}, 1)])[0].loglikelihood.tolist()))
"""
    project = Path(pytest_lmeval.__file__).parents[1]
    settings = os.environ | ({} if torch.cuda.is_available() else ON_CPU) | {"PYTHONPATH": str(project)}
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, env=settings)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")] or pytest.fail(done.stderr[-2000:])
    own = Engine(local).score([Request(np.array(ids), 1)])[0].loglikelihood
    np.testing.assert_allclose(json.loads(line.removeprefix("FOUND")), own, atol=CLOSE)


def test_what_it_serves_is_what_is_loaded_and_another_model_is_explained(served, local, folder):
    ids = np.array(local.tokenizer.encode("It was the best of times, it was the worst of times. " * 12)[0])

    def compared(reference):
        policies = [policy_for(lm, window=80, overlap=0) for lm in (served, reference)]
        return measure_agreement(served, reference, ids, policy=policies[0], reference_policy=policies[1])

    same = compared(local)
    assert same.agreement == 1
    assert same.explanation == []
    assert same.mean_exp_difference < 1.001
    other = load(f"hf:{folder}@fp32")
    with torch.no_grad():
        for name, parameter in other.module.named_parameters():
            if "q_proj" in name:
                parameter.mul_(1.2)
    assert compared(other).explanation
