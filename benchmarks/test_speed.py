"""Measure latency and throughput. pytest-benchmark stores the times; the report shows them beside quality.

pytest benchmarks/test_speed.py --lm hf:FOLDER_OR_ID
pytest benchmarks/test_speed.py --benchmark-save=base      and later: --benchmark-compare
"""

import pytest

pytestmark = pytest.mark.benchmark


def test_latency(lmeval, lm, benchmark, seq_len):  # 128 and 512 tokens, or what --lmeval-seq-len says
    """Read a prompt and generate eight tokens: 100 runs after 10 to warm up."""
    result = lmeval.latency(lm, batch_size=1, seq_len=seq_len)
    assert result.ttft < 10_000  # milliseconds, the median; set it to what your users accept


def test_latency_over_a_grid(lmeval, lm, benchmark):
    """Latency for longer prompts and larger batches. A cell that does not fit into memory is marked."""
    grid = lmeval.latency_grid(lm, batch_sizes=(1, 4), seq_lens=(64, 256), runs=20)
    assert grid[1, 64].ttft < grid[4, 256].ttft


def test_throughput(lmeval, lm, benchmark):
    """Batches of 32 prompts of 512 tokens for ten seconds, and the rate of each smaller batch."""
    result = lmeval.throughput(lm, batch_size=32, seq_len=512)
    assert max(result.batch_scaling.y) > 100  # tokens a second


def test_streaming(lmeval, lm, benchmark):
    """Does the last chunk of a long text take longer than the first? It does for a model that keeps all tokens."""
    result = lmeval.streaming(lm, chunk_size=128)
    assert result.tokens_per_second > 100
