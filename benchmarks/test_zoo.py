"""Measure how much faster each model of the zoo reads chunks than single tokens, with the same logits.

A model that is exact for any chunk only because it loops over tokens gains little. Processor time, by turns: a busy machine
changes little.
"""

import statistics
import time

import pytest
import torch

from pytest_lmeval import Engine, Value

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("one_thread")]

EXACT = ["transformer", "windowed", "lstm", "mamba", "mamba2", "ttt", "moshi", "causal-bk"]
CHUNK, TOKENS, ROUNDS = 1024, 2048, 3
STEPS = 512  # the first of those tokens, read one at a time: the cheapest where the state grows


def read(lm, ids, size):
    """Tokens a processor second, and the logits of the first STEPS tokens."""
    began = time.process_time()
    logits = [found[..., :STEPS, :] for found, _ in Engine(lm).steps(torch.split(ids, size, dim=-1))]
    return ids.shape[-1] / (time.process_time() - began), torch.cat(logits, dim=-2)[..., :STEPS, :]


@pytest.mark.parametrize("name", EXACT)
def test_chunks_against_single_steps(lmeval, load_lm, name):
    lm = load_lm(f"zoo:{name}")
    ids = lm.random_ids(1, TOKENS)
    _, expected = read(lm, ids, CHUNK)  # warms up as well
    chunks, steps = [], []
    for _ in range(ROUNDS):
        for size, length, speeds in ((CHUNK, TOKENS, chunks), (1, STEPS, steps)):
            speed, logits = read(lm, ids[..., :length], size)
            speeds.append(speed)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    ratios = sorted(chunk / step for chunk, step in zip(chunks, steps, strict=True))
    speedup = Value(statistics.median(ratios), "x", low=ratios[0], high=ratios[-1], n=ROUNDS, higher_is_better=True)
    most = [Value(max(speeds), "tokens/s", n=ROUNDS, higher_is_better=True) for speeds in (chunks, steps)]
    lmeval.record(lm, "chunks against single steps", speedup=speedup, chunks=most[0], single_steps=most[1])


@pytest.mark.parametrize("name", EXACT)
def test_streams_exactly(lmeval, load_lm, name):
    result = lmeval.equivalence(load_lm(f"zoo:{name}"))

    assert result.verdict == "exact-any-chunk", result


def test_bk_as_published_sees_its_future(lmeval, load_lm):
    result = lmeval.equivalence(load_lm("zoo:bk"))

    assert result.verdict == "non-causal", result
