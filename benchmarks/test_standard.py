"""Measure quality, laws, speed, memory and efficiency of a model in one run.

    pytest benchmarks/test_standard.py --lm hf:./my-checkpoint
    pytest benchmarks/test_standard.py --lm zoo:mamba --lm hf:./my-checkpoint@int8      several, side by side
    pytest benchmarks/test_standard.py -k "not speed"                                   without a part, by its name
    pytest benchmarks/test_standard.py -m "not slow" --lmeval-tokens 20k

Each part is written when it ends; an interrupted run resumes where it stopped.
"""

import pytest

from pytest_lmeval import CorpusError

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_quality_reading(lmeval, lm, corpus, split):
    """Perplexity, bits per byte and top-k accuracy; of the training split, as many tokens as a held-out one has."""
    result = lmeval.perplexity(lm, corpus("stdlib", split), tokens=None if split != "train" else 100_000)
    assert result.bits_per_byte < 8  # the loss of knowing nothing


def test_quality_task(lmeval, lm):
    """Which of four texts continues a passage of Python's documentation? No download is needed."""
    result = lmeval.task(lm, "stdlib_next")
    assert result.accuracy.high > result.chance  # not certainly worse than guessing


@pytest.mark.parametrize("task", ["sst2", "rte", "boolq", "mrpc"])
def test_quality_smallbench(lmeval, lm, task):
    try:
        result = lmeval.task(lm, f"smallbench:{task}", limit=500)
    except CorpusError as error:
        pytest.skip(str(error))
    assert result.accuracy_per_token.high > result.chance


def test_laws(lmeval, lm):
    result = lmeval.equivalence(lm)
    assert result.verdict in ("exact-any-chunk", "exact-step-only", "consistent") or result.verdict.startswith("exact-multiple")


def test_speed_latency(lmeval, lm, benchmark, seq_len):
    lmeval.latency(lm, seq_len=seq_len)


@pytest.mark.slow
def test_speed_throughput(lmeval, lm, benchmark):
    lmeval.throughput(lm, seq_len=512)


def test_speed_streaming(lmeval, lm, benchmark):
    lmeval.streaming(lm, chunks=16)


def test_memory(lmeval, lm):
    lmeval.memory(lm, seq_len=512)


def test_efficiency(lmeval, lm, benchmark):
    lmeval.efficiency(lm, seq_len=128)
