"""Speed is counted and summarised rightly; how fast it is, no test says."""

import pytest
import torch
from toys import Functional, Stateless

from pytest_lmeval.adapters import as_model
from pytest_lmeval.profiling.latency import latency
from pytest_lmeval.profiling.throughput import throughput
from pytest_lmeval.profiling.timer import median, spread

LM = as_model(Functional())


class Counting(Functional):
    """Remembers the shapes that it was asked to read."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, input_ids, state=None):
        self.shapes.append(tuple(input_ids.shape))
        return super().forward(input_ids, state)


def test_a_run_reads_the_prompt_once_and_decodes_token_by_token():
    module = Counting()
    lm = as_model(module)
    module.shapes.clear()
    result = latency(lm, batch_size=3, seq_len=20, new_tokens=4, runs=5, warm_up=2)
    assert module.shapes == [(3, 20), (3, 1), (3, 1), (3, 1)] * 7
    assert (result.prefill.n, result.ttft.n, result.itl.n, result.tpot.n, result.e2e.n) == (5, 5, 15, 5, 5)
    assert result.record.cost["state_bytes"] == 3 * 16 * 4


def test_the_parts_of_a_run_add_up():
    result = latency(LM, seq_len=16, new_tokens=5, runs=1, warm_up=0)
    assert float(result.prefill) <= float(result.ttft) <= float(result.e2e)
    assert float(result.e2e) == pytest.approx(float(result.ttft) + 4 * float(result.tpot), rel=1e-6)
    assert float(result.record.metrics["cold"]) == float(result.e2e)


def test_a_model_without_a_state_is_only_timed_reading():
    result = latency(as_model(Stateless()), seq_len=16, runs=3, warm_up=0)
    assert result.prefill > 0
    assert "itl" not in result.record.metrics


def test_percentiles_are_given_only_where_the_samples_carry_them():
    values = list(range(1, 1001))
    assert "x_p90" in spread("x", values[:100], "s")
    assert "x_p90" not in spread("x", values[:99], "s")
    assert "x_p95" not in spread("x", values[:199], "s")
    assert float(spread("x", values, "s")["x_p99"]) == pytest.approx(990, abs=1)
    with pytest.raises(KeyError):
        latency(LM, seq_len=4, runs=5, warm_up=0).percentile("prefill", 99)


def test_the_median_has_an_interval_from_eight_samples_on():
    assert median([1.0] * 7, "s").low is None
    metric = median([5, 1, 4, 2, 3, 9, 8, 7, 6], "s", scale=10)
    assert (float(metric), metric.low <= 50 <= metric.high, metric.n) == (50.0, True, 9)


def test_throughput_counts_the_tokens_of_the_batch():
    result = throughput(LM, batch_size=6, seq_len=10, runs=4, warm_up=1)
    seconds = float(result.record.metrics["batch_seconds"])
    assert float(result.tokens_per_second) == pytest.approx(60 / seconds, rel=0.5)
    assert result.batch_scaling.x == [1.0, 2.0, 4.0]
    assert result.record.cost["tokens"] == 5 * 60


def test_a_runner_that_does_not_time_leaves_no_numbers():
    def once(run, *, rounds, warmup_rounds):
        run()
        return "disabled"

    for result in (latency(LM, seq_len=4, runner=once), throughput(LM, batch_size=2, seq_len=4, runner=once)):
        assert result.not_measured == "disabled"
        assert result.record.metrics == {}


def test_nothing_is_kept_for_a_backward_pass():
    seen = []

    class Watching(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            seen.append(logits.requires_grad)
            return logits, state

    latency(as_model(Watching()), seq_len=4, runs=1, warm_up=0)
    assert not any(seen)
    assert torch.is_grad_enabled()
