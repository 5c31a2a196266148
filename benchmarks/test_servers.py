"""Measure a served model beside the same folder in transformers: its values, and what they cost.

    LMEVAL_REAL_MODEL=FOLDER LMEVAL_REAL_DATA=MIRROR LMEVAL_VLLM_ENV=ENV pytest benchmarks/test_servers.py -s

The server is started from the environment that LMEVAL_VLLM_ENV names, in float32, and stopped at the end. Printed are the
largest difference of a log-probability on 200 prompts; processor and wall time of the same rows of HellaSwag; and the processor
time that the client takes a request, by which it is known when it is the bottleneck.
"""

import gc
import os
import time

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from real_model import MISSING as NO_MODEL, real_model_folder
from real_server import MISSING, environment, processor_seconds, vllm

from pytest_lmeval import Engine, corpus, policy_for
from pytest_lmeval.engine import Request
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.measures._task_reading import Asking
from pytest_lmeval.models._sources import load
from pytest_lmeval.tasks import find

pytestmark = [pytest.mark.benchmark, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
PROMPTS, LONGEST = 200, 120
ROWS = 20  # of HellaSwag, four endings each
CLOSE = 5e-4  # nats
CLIENT = 0.02  # seconds of processor time a request, at most


@pytest.fixture(scope="module")
def folder():
    return real_model_folder() or pytest.skip(NO_MODEL)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """(model, pid)"""
    if environment() is None:
        pytest.skip(MISSING)
    with vllm(folder, tmp_path_factory.mktemp("vllm") / "log") as (url, pid):
        yield load(f"server:{url}@fp32", concurrency=8), pid
        gc.collect()


@pytest.fixture(scope="module")
def local(folder):
    return load(f"hf:{folder}@fp32")


@pytest.fixture(scope="module")
def prompts(local):
    text = "".join(document.text for document in corpus("stdlib").documents())
    ids = np.array(local.tokenizer.encode(text[:200_000])[0])
    drawn = np.random.default_rng(0)
    starts, lengths = drawn.integers(0, len(ids) - LONGEST, PROMPTS), drawn.integers(8, LONGEST, PROMPTS)
    return [Request(ids[start : start + length], 1) for start, length in zip(starts, lengths, strict=True)]


def directly(module, requests):
    """The log-likelihoods by a loop over transformers, one sequence at a time."""
    found = []
    with torch.no_grad():
        for request in requests:
            ids = torch.from_numpy(request.ids)
            rows = module(ids[None, :-1]).logits[0].double().log_softmax(-1)
            found.append(rows[torch.arange(len(rows)), ids[1:]][request.context_len - 1 :].numpy())
    return found


def test_values_are_those_of_transformers_and_the_client_costs_little(server, local, prompts):
    lm, _ = server
    Engine(lm).score(prompts[:8])
    began = time.process_time()
    found = Engine(lm).score(prompts)
    client = (time.process_time() - began) / PROMPTS
    differences = [np.abs(one.loglikelihood - own) for one, own in zip(found, directly(local.module, prompts), strict=True)]
    largest, tokens = max(map(np.max, differences)), sum(map(len, differences))
    mean = np.concatenate(differences).mean()
    print(f"\n{PROMPTS} prompts, {tokens:,} tokens: largest difference {largest:.2g} nats, mean {mean:.2g};")
    print(f"the client takes {1000 * client:.2f} ms of processor time a request")
    assert largest < CLOSE
    assert client < CLIENT


def test_rows_of_hellaswag_cost_so_much_here_and_there(server, local):
    mirror = os.environ.get("LMEVAL_REAL_DATA") or pytest.skip("needs LMEVAL_REAL_DATA=MIRROR")
    lm, pid = server
    rows = {"limit": ROWS, "data_dir": mirror}
    task = find("hellaswag")

    def timed(work, processes=()):
        before, wall, own = sum(map(processor_seconds, processes)), time.perf_counter(), time.process_time()
        found = work()
        return found, time.perf_counter() - wall, time.process_time() - own, sum(map(processor_seconds, processes)) - before

    def through(model):
        return measure_task(model, task, **rows, policy=policy_for(model, batch_size=8))

    served, wall, own, theirs = timed(lambda: through(lm), [pid])
    here, here_wall, here_own, _ = timed(lambda: through(local))
    encoded = [one for question in Asking(task, **rows).questions(local).encoded for one in question.scored]
    _, plain_wall, plain_own, _ = timed(lambda: directly(local.module, encoded))
    print(f"\nHellaSwag, {ROWS} rows, {len(encoded)} requests, seconds of wall and processor time:")
    print(f"through vLLM {wall:.1f} and {theirs:.1f} of the server, {own:.2f} of the client;")
    print(
        f"transformers in a loop {plain_wall:.1f} and {plain_own:.1f}; here on transformers {here_wall:.1f} and {here_own:.1f}"
    )
    assert [one.output for one in served.examples] == [one.output for one in here.examples]
    for one, other in zip(served.examples, here.examples, strict=True):
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=20 * CLOSE)
