"""Everything that one wants to know of a model, in one run and one record: quality, laws, speed, memory, efficiency.

    pytest benchmarks/test_standard.py --lm hf:./my-checkpoint
    pytest benchmarks/test_standard.py --lm zoo:mamba --lm hf:./my-checkpoint@int8      several, side by side
    pytest benchmarks/test_standard.py -k "not speed"                                   each part is left out by its name
    pytest benchmarks/test_standard.py -m "not slow" --lmeval-tokens 20k

What each part finds is written when it ends; a run that was interrupted goes on where it stopped.
"""

import pytest

from pytest_lmeval import CorpusError

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_quality_reading(lmeval, lm, corpus, split):
    """Perplexity, bits per byte and top-k accuracy. The training split is read as far as a held-out one is long."""
    result = lmeval.perplexity(lm, corpus("stdlib", split), tokens=None if split != "train" else 100_000)
    assert result.bits_per_byte < 8  # what knowing nothing costs


def test_quality_task(lmeval, lm):
    """Which of four passages of Python's documentation goes on like this? No download is needed."""
    result = lmeval.task(lm, "stdlib_next")
    assert result.accuracy.high > result.chance  # what no model may be is certainly worse than guessing


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
