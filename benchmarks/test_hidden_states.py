"""Measure what hidden states cost: memory and time of one pass, beside keeping every vector and computing at the end.

pytest benchmarks/test_hidden_states.py --lm hf:FOLDER -s
"""

import time

import pytest
import torch

from pytest_lmeval import Value, policy_for
from pytest_lmeval.measures._hidden_states import hidden_batches, measure_hidden_states
from pytest_lmeval.profiling._peak import peak_memory

pytestmark = pytest.mark.benchmark
TEXTS, CHARACTERS = 60, 2_000
LEAST_SAVED = 0.8


@pytest.fixture(scope="module")
def texts():
    from pytest_lmeval import corpus

    whole = "".join(document.text for document in corpus("stdlib", "train").documents())
    return [whole[begin : begin + CHARACTERS] for begin in range(0, TEXTS * CHARACTERS, CHARACTERS)]


def at_the_end(lm, texts, policy):
    """Every vector kept, and what torch computes of them."""
    kept = {}
    for batch in hidden_batches(lm, texts, policy, token="all"):
        for name, vectors in batch.vectors.items():
            kept.setdefault(name, []).append(vectors)
    return {name: torch.cov(torch.cat(kept.pop(name)).double().T) for name in [*kept]}


def measured(lm, work):
    with peak_memory(lm.device) as peak:
        began = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - began
    return found, peak.growth, seconds


def test_one_pass_holds_a_small_part_of_the_memory_of_all_vectors(lmeval, lm, texts):
    policy = policy_for(lm, window="unlimited" if lm.stateful else None)  # nothing is probed: both read alike
    list(hidden_batches(lm, texts[:2], policy, token="all"))  # what the first step allocates stays
    result, one_pass, seconds = measured(lm, lambda: measure_hidden_states(lm, texts, token="all", policy=policy))
    expected, all_vectors, their_seconds = measured(lm, lambda: at_the_end(lm, texts, policy))
    if one_pass is None:
        pytest.skip("this system does not tell the most memory that a process held")
    errors = [
        float((result.states[name].first.covariance - covariance).abs().max() / covariance.abs().max())
        for name, covariance in expected.items()
    ]
    values = {
        "tokens": Value(result.states.tokens, "tokens"),
        "peak_in_one_pass": Value(one_pass, "bytes"),
        "peak_of_all_vectors": Value(all_vectors, "bytes"),
        "memory_saved": Value(1 - one_pass / all_vectors, higher_is_better=True),
        "time_over_all_vectors": Value(seconds / their_seconds, "x", higher_is_better=False),
        "largest_relative_error": Value(max(errors), higher_is_better=False),
    }
    print(f"\n{lm.spec}: " + ", ".join(f"{name} {value!r}" for name, value in values.items()), flush=True)
    lmeval.record(lm, "hidden states in one pass", **values)
    assert max(errors) < 1e-10
    assert values["memory_saved"] > LEAST_SAVED


def test_a_low_rank_lacks_no_more_than_it_says(lmeval, lm, texts):
    policy = policy_for(lm, window="unlimited" if lm.stateful else None)
    (exact, _, seconds), (low, _, low_seconds) = (
        measured(lm, lambda rank=rank: measure_hidden_states(lm, texts[:4], token="all", policy=policy, rank=rank))
        for rank in ("exact", 64)
    )
    lacking, errors = [], []
    for name in exact.states:
        true, shown = exact.states[name].directions, low.states[name].directions
        lacking.append(float((1 - shown.variances[:4] / true.variances[:4]).max()))
        errors.append(shown.error / true.total)
        assert bool((shown.variances[:4] + shown.error >= true.variances[:4] * (1 - 1e-9)).all())
    values = {
        "largest_lack_of_the_first_four_variances": Value(max(lacking), higher_is_better=False),
        "largest_stated_error": Value(max(errors), higher_is_better=False),
        "time_over_exact": Value(low_seconds / seconds, "x", higher_is_better=False),
    }
    print(f"\n{lm.spec}, rank 64: " + ", ".join(f"{name} {value!r}" for name, value in values.items()), flush=True)
    lmeval.record(lm, "hidden states of low rank", **values)
