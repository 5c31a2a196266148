"""Runs that torchrun starts, as users do: one terminal, one report, one outcome a test, and what is left of a run that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest

from pytest_lmeval.records._document import load

pytestmark = pytest.mark.thorough
TIMEOUT = 300  # seconds

OUTCOMES = """
import os
import pytest
import tiny
from pytest_lmeval import Choices, Task

RANK = os.environ.get("RANK")
ROWS = [{"n": n} for n in range(12)]

def ask(row):
    return Choices(f"{row['n']} is", (" even", " odd"), row["n"] % 2)

def score(row, output):
    if RANK == "1":
        raise ValueError("a scorer that fails here")
    return True

def test_scores(lmeval):
    assert lmeval.task(tiny.Tiny(), Task("parity", ROWS, ask)).accuracy.n == 12

def test_fails_on_one_rank():
    assert RANK != "1", "only on this rank"

def test_a_verb_fails_on_one_rank(lmeval):
    lmeval.task(tiny.Tiny(), Task("scored", ROWS, ask, score=score))

def test_is_skipped_on_one_rank():
    if RANK == "1":
        pytest.skip("not on this rank")

@pytest.fixture
def broken():
    yield
    assert RANK != "1", "a teardown that fails here"

def test_is_torn_down(broken):
    pass

def test_times(lmeval):
    assert lmeval.latency(tiny.Tiny(), seq_len=4, new_tokens=2, runs=2).ttft > 0
"""

DIES = """
import os
import time
from pathlib import Path
import tiny
from pytest_lmeval import Choices, Task

def test_first(lmeval):
    task = Task("parity", [{"n": n} for n in range(12)], lambda row: Choices(f"{row['n']} is", (" even", " odd"), row["n"] % 2))
    lmeval.task(tiny.Tiny(), task)

def test_second(lmeval, corpus):
    if Path("dies").exists() and os.environ.get("RANK") == "1":
        time.sleep(1)
        os.kill(os.getpid(), 9)
    lmeval.perplexity(tiny.Tiny(), corpus("stdlib"), as_stream=False, tokens=60, limit=8)
"""


def started(project, *arguments, nodes=1, per_node=2):
    """torchrun, once for each of several pretended machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = [
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(port),
        "--nnodes",
        str(nodes),
        "--nproc-per-node",
        str(per_node),
    ]
    tests = ["-m", "pytest", "-p", "no:cacheprovider", "--lmeval-budget", "1000", *arguments]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *where, "--node-rank", str(node), *tests],
            cwd=project.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=threads,
        )
        for node in range(nodes)
    ]  # fmt: skip


def finished(processes):
    """What each prints, and its exit status."""
    try:
        return [(process.communicate(timeout=TIMEOUT)[0], process.returncode) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


def test_ranks_on_two_machines_have_one_report_and_one_outcome_a_test(project):
    project.makepyfile(test_own=OUTCOMES)
    (first, status), (second, _) = finished(started(project, "--junitxml", "junit.xml", "-rA", nodes=2, per_node=1))
    assert status == 1, first
    assert "3 passed, 1 skipped, 2 failed" in first or "2 failed, 3 passed, 1 skipped, 1 error" in first, first
    assert "on rank 1 of 2: AssertionError: only on this rank" in first
    assert "rank 1 failed: " in first
    assert "a scorer that fails here" in first
    assert "passed" not in second  # its terminal is that of the first
    document = load(project.path / ".lmeval")
    assert {record.test: record.outcome for record in document.records} == {
        "test_own.py::test_scores": "passed", "test_own.py::test_times": "passed"
    }  # fmt: skip
    assert len(ElementTree.parse(project.path / "junit.xml").findall(".//testcase")) >= 6


def test_a_rank_that_dies_ends_the_run_with_its_name_and_what_is_finished_is_kept(project):
    project.makepyfile(test_own=DIES)
    (project.path / "dies").touch()
    began = time.monotonic()
    ((said, status),) = finished(started(project))
    assert status != 0
    assert time.monotonic() - began < 120
    assert "rank 1 of 2 is lost" in said, said
    assert [record.test for record in load(project.path / ".lmeval").records] == ["test_own.py::test_first"]
    (project.path / "dies").unlink()
    ((said, status),) = finished(started(project))
    assert status == 0, said
    assert "12 answers taken from an earlier run" in said
    once = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--lmeval-budget", "1000", "--lmeval-dir", "one"],
        cwd=project.path, capture_output=True, text=True, check=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert "passed" in once.stdout
    values = [{record.test: record.metrics for record in load(project.path / name).records} for name in (".lmeval", "one")]
    for test, metrics in values[1].items():
        for name, value in metrics.items():
            if name != "tokens_per_second":
                assert float(values[0][test][name]) == pytest.approx(float(value), rel=1e-6)


def test_a_model_that_spans_the_ranks_has_the_numbers_of_one_process(project, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    project.makepyfile("""
        def test_reads(lmeval, lm):
            lmeval.perplexity(lm, list(range(200)) * 2)

        def test_laws(lmeval, lm):
            lmeval.equivalence(lm)
    """)
    spec = f"hf:{tmp_path / 'llama'}"
    ((said, status),) = finished(started(project, "--lm", f"{spec},tp_plan=auto", "--lmeval-dir", "split"))
    assert status == 0, said
    own = ("--lm", spec, "--lmeval-dir", "one")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--lmeval-budget", "1000", *own],
        cwd=project.path, capture_output=True, check=True, timeout=TIMEOUT,
    )  # fmt: skip
    split, one = (json.loads((project.path / name / "metrics.json").read_text())["records"] for name in ("split", "one"))
    assert split[0]["metrics"]["nll"]["value"] == pytest.approx(one[0]["metrics"]["nll"]["value"], rel=1e-5)
    assert split[0]["certificate"]["verdict"] == one[0]["certificate"]["verdict"]
