"""How long does one wait, and how much gets done? pytest-benchmark keeps the times; the report shows them beside quality."""

import pytest

pytestmark = pytest.mark.benchmark


def test_latency(lmeval, lm, benchmark, seq_len):  # 128 and 512, or what --lmeval-seq-len says
    lmeval.latency(lm, batch_size=1, seq_len=seq_len, runs=30)


def test_throughput(lmeval, lm, benchmark):
    lmeval.throughput(lm, batch_size=32, seq_len=512, runs=5)
