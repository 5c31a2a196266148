"""Speed is counted and summarised rightly; how fast it is, no test says.

Where times matter, they are those of a clock that only the model moves.
"""

import gc
import math
import time
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from tiny_models import Functional, Stateless

from pytest_lmeval.errors import NotMeasuredError, ProfilingError
from pytest_lmeval.measures._latency import measure_latency
from pytest_lmeval.measures._latency_grid import measure_latency_grid
from pytest_lmeval.measures._streaming import measure_streaming
from pytest_lmeval.measures._throughput import measure_throughput
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.profiling import _clock as clock
from pytest_lmeval.profiling._runner import Runner
from pytest_lmeval.profiling._samples import median, runs_to_see, spread, stability

LM = as_model(Functional())
NOT_TIMED = Runner(not_measured="disabled")


class Clock:
    """Stands in for the module `time`; only a model moves it."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def still(monkeypatch):
    clock.tick.cache_clear()
    monkeypatch.setattr(clock, "time", fake := Clock())
    monkeypatch.setattr("pytest_lmeval.profiling._runner.tick", lambda device: 1e-9)
    return fake


class Slow(Functional):
    """Takes so many seconds: for a prompt by its size, for a token one after the other of those given."""

    def __init__(self, clock, *, prompt=1e-4, tokens=(2e-3,)):
        super().__init__()
        self.clock, self.prompt, self.tokens = clock, prompt, cycle(tokens)

    def forward(self, input_ids, state=None):
        one = input_ids.shape[1] == 1
        self.clock.now += next(self.tokens) if one else self.prompt * input_ids.numel()
        return super().forward(input_ids, state)


class Counting(Functional):
    """Remembers the shapes that it was asked to read."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, input_ids, state=None):
        self.shapes.append(tuple(input_ids.shape))
        return super().forward(input_ids, state)


class Choosy(Functional):
    """Fails at some sizes."""

    def forward(self, input_ids, state=None):
        if input_ids.shape[0] == 4 and input_ids.shape[1] > 1:
            raise RuntimeError("no kernel for four rows")
        return super().forward(input_ids, state)


def test_a_run_reads_the_prompt_once_and_decodes_token_by_token():
    module = Counting()
    lm = as_model(module)
    module.shapes.clear()
    result = measure_latency(lm, batch_size=3, seq_len=20, new_tokens=4, runs=5, warm_up=2)
    assert module.shapes == [(3, 20), (3, 1), (3, 1), (3, 1)] * (7 + 1)  # the last run is counted in operations
    assert (result.prefill.n, result.ttft.n, result.itl.n, result.tpot.n, result.e2e.n) == (5, 5, 15, 5, 5)
    assert result.record.cost.state_bytes == 3 * 16 * 4


def test_known_times_are_reported_as_they_are(still):
    lm = as_model(Slow(still, prompt=1e-3, tokens=(2e-3, 4e-3, 9e-3)))
    result = measure_latency(lm, seq_len=10, new_tokens=4, runs=20, warm_up=0)
    assert [float(found) for found in (result.prefill, result.ttft, result.itl, result.tpot, result.e2e)] == pytest.approx(
        [10, 10, 4, 5, 25]
    )
    assert float(result.record.metrics["prefill_tokens_per_second"]) == pytest.approx(1000)
    assert float(result.record.metrics["decode_tokens_per_second"]) == pytest.approx(200)
    assert result.record.cost.seconds == pytest.approx(20 * 0.025)


@pytest.mark.parametrize("slow_percent", [1, 4, 7, 11, 50, 99])  # at 5 and 10, a percentile lies between two times
def test_a_percentile_is_the_time_that_so_many_steps_stay_below(still, slow_percent):
    steps = [20e-3] * slow_percent + [1e-3] * (100 - slow_percent)
    result = measure_latency(as_model(Slow(still, tokens=steps)), seq_len=2, new_tokens=101, runs=3, warm_up=0)
    for percent in (90, 95):
        assert float(result.percentile("itl", percent)) == pytest.approx(20 if slow_percent > 100 - percent else 1)


def test_the_first_call_is_reported_apart(still):
    lm = as_model(Slow(still, tokens=(0.5, *[1e-3] * 99)))
    still.now = 0.0
    lm.module.tokens = cycle((0.5, *[1e-3] * 999))
    result = measure_latency(lm, seq_len=2, new_tokens=2, runs=10, warm_up=3)
    assert float(result.record.metrics["cold"]) == pytest.approx(500.2)
    assert float(result.record.metrics["e2e_max"]) == pytest.approx(1.2)


def test_the_parts_of_a_run_add_up():
    result = measure_latency(LM, seq_len=16, new_tokens=5, runs=1, warm_up=0)
    assert float(result.prefill) <= float(result.ttft) <= float(result.e2e)
    assert float(result.e2e) == pytest.approx(float(result.ttft) + 4 * float(result.tpot), rel=1e-6)
    assert float(result.record.metrics["cold"]) == float(result.e2e)


def test_a_model_without_a_state_is_only_timed_reading():
    result = measure_latency(as_model(Stateless()), seq_len=16, runs=3, warm_up=0)
    assert result.prefill > 0
    assert "itl" not in result.record.metrics


def test_percentiles_are_given_only_where_the_samples_carry_them():
    values = list(range(1, 1001))
    assert "x_p90" in spread("x", values[:100])
    assert "x_p90" not in spread("x", values[:99])
    assert "x_p95" not in spread("x", values[:199])
    assert float(spread("x", values)["x_p99"]) == pytest.approx(990, abs=1)
    with pytest.raises(KeyError):
        measure_latency(LM, seq_len=4, runs=5, warm_up=0).percentile("prefill", 99)


def test_the_median_has_an_interval_from_eight_samples_on():
    assert median("seconds", [1.0] * 7).low is None
    value = median("ttft", [5, 1, 4, 2, 3, 9, 8, 7, 6])  # seconds, of a metric in milliseconds
    assert (float(value), value.unit, value.low <= 5000 <= value.high, value.n) == (5000.0, "ms", True, 9)


def test_the_machine_is_graded_by_the_spread_of_the_times():
    assert stability([1.0] * 7) is None
    assert stability([1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 50.0]) == "steady"  # one disturbed run is no disturbed machine
    assert stability([1.0, 1.2, 1.0, 1.2, 1.0, 1.2, 1.0, 1.2]) == "fluctuating"
    assert stability([1.0, 2.0] * 4) == "disturbed"


def test_the_runs_that_a_difference_needs_see_it_four_times_in_five():
    generator = torch.Generator().manual_seed(0)
    pilot = (100 + 10 * torch.randn(4000, generator=generator)).tolist()
    runs = runs_to_see(pilot, 0.05)
    assert runs == pytest.approx(2 * (2.8 * 0.1 / 0.05) ** 2, rel=0.1)
    base, slower = ((mean + 10 * torch.randn(2000, runs, generator=generator)).mean(1) for mean in (100.0, 105.0))
    seen = (slower - base) / (10 * (2 / runs) ** 0.5) > 1.96
    assert float(seen.float().mean()) == pytest.approx(0.8, abs=0.04)


def test_throughput_counts_the_tokens_of_the_batch(still):
    result = measure_throughput(as_model(Slow(still, prompt=1e-3)), batch_size=6, seq_len=10, runs=4, warm_up=1)
    assert float(result.tokens_per_second) == pytest.approx(1000)
    assert float(result.record.metrics["sustained_tokens_per_second"]) == pytest.approx(1000)
    assert float(result.decode_tokens_per_second) == pytest.approx(6 / 2e-3)
    assert result.batch_scaling.x == [1.0, 2.0, 4.0, 6.0]
    assert result.record.cost.tokens == 4 * 60


def test_throughput_is_taken_for_so_many_seconds(still):
    result = measure_throughput(as_model(Slow(still, prompt=1e-2)), batch_size=2, seq_len=10, seconds=5.0, scaling=False)
    assert result.record.cost.seconds == pytest.approx(5.0)
    assert result.tokens_per_second.n == 25


class Saturating(Slow):
    """Reads a batch of up to eight rows in the time of one."""

    def forward(self, input_ids, state=None):
        self.clock.now += 1e-2 * max(1, input_ids.shape[0] / 8)
        return Functional.forward(self, input_ids, state)


def test_the_knee_is_where_more_rows_stop_helping(still):
    result = measure_throughput(as_model(Saturating(still)), batch_size=32, seq_len=4, runs=3)
    assert result.batch_scaling.y == pytest.approx([400, 800, 1600, 3200, 3200, 3200])
    assert float(result.knee) == 8
    assert float(result.record.metrics["decode_knee_rows"]) == 8


def test_a_batch_size_at_which_a_model_fails_does_not_cost_the_others():
    result = measure_throughput(as_model(Choosy()), batch_size=8, seq_len=4, runs=2)
    assert result.batch_scaling.x == [1.0, 2.0, 8.0]
    assert "no kernel for four rows" in result.record.details["failed"]["4"]
    failing = measure_throughput(as_model(Choosy()), batch_size=4, seq_len=4, runs=2)
    assert failing.batch_scaling.x == [1.0, 2.0]
    with pytest.raises(ProfilingError, match=r"failed at batch 4, 4 tokens, .*no kernel for four rows"):
        failing.tokens_per_second  # noqa: B018


def test_a_cell_of_a_grid_that_fails_is_marked_and_the_others_are_measured():
    grid = measure_latency_grid(as_model(Choosy()), batch_sizes=(1, 4, 8), seq_lens=(4, 8), runs=2, warm_up=0)
    assert set(grid) == {(rows, tokens) for rows in (1, 4, 8) for tokens in (4, 8)}
    assert set(grid.failed) == {(4, 4), (4, 8)}
    assert grid[8, 8].ttft > 0
    with pytest.raises(ProfilingError, match="no kernel"):
        grid[4, 8].ttft  # noqa: B018
    with pytest.raises(ProfilingError, match="no cells"):
        measure_latency_grid(LM, batch_sizes=())


def test_options_that_fit_no_cell_are_refused_before_the_first_one():
    with pytest.raises(TypeError, match="unexpected keyword argument 'run'"):
        measure_latency_grid(LM, run=3)
    with pytest.raises(ProfilingError, match="runs is 0"):
        measure_latency_grid(LM, runs=0)


class Vanishing(Functional):
    """Its device is lost at a batch of two, and nothing can be read from it afterwards."""

    lost, steps = False, 0

    def forward(self, input_ids, state=None):
        self.steps += 1
        self.lost = self.lost or len(input_ids) == 2
        if self.lost:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().forward(input_ids, state)


def test_after_a_lost_device_the_other_cells_are_marked_and_what_was_measured_is_kept(monkeypatch):
    lm, kept = as_model(Vanishing()), []
    grid = measure_latency_grid(
        lm, batch_sizes=(1, 2, 4), seq_lens=(4,), runs=2, warm_up=0, keep=lambda cell: kept.append(cell) or cell
    )
    assert [cell.record.details.get("failure") for cell in kept] == [
        None,
        *2 * ["device lost: CUDA error: device-side assert triggered"],
    ]
    assert grid[1, 4].ttft > 0
    steps = lm.module.steps
    measure_latency_grid(lm, batch_sizes=(2, 4, 8), seq_lens=(4,), runs=2, warm_up=0)
    assert lm.module.steps == steps + 1  # nothing is tried on a device that is gone


class WithoutDecoding(Functional):
    def forward(self, input_ids, state=None):
        if state is not None and len(input_ids) == 4:
            raise RuntimeError("no kernel for one token of four rows")
        return super().forward(input_ids, state)


def test_a_batch_that_can_be_read_and_not_decoded_keeps_how_fast_it_is_read():
    result = measure_throughput(as_model(WithoutDecoding()), batch_size=4, seq_len=8, runs=2, scaling=False)
    assert result.tokens_per_second > 0
    assert "no kernel for one token" in result.record.details["failed"]["decode"]


def test_of_a_model_that_reads_frames_the_rates_are_of_frames():
    frames = load("zoo:moshi")
    waits = measure_latency(frames, seq_len=2, new_tokens=2, runs=1, warm_up=0).record.metrics
    assert waits["decode_tokens_per_second"].unit == "frames/s"
    result = measure_throughput(frames, batch_size=2, seq_len=2, runs=1, new_tokens=2)
    assert (result.tokens_per_second.unit, result.batch_scaling.y_unit) == ("frames/s", "frames/s")
    assert measure_streaming(frames, chunk_size=2, chunks=4, runs=1).tokens_per_second.unit == "frames/s"
    assert measure_throughput(LM, batch_size=2, seq_len=2, runs=1).tokens_per_second.unit == "tokens/s"


def test_steps_that_the_clock_is_too_coarse_for_are_left_out_of_a_throughput(still, monkeypatch):
    monkeypatch.setattr("pytest_lmeval.profiling._runner.tick", lambda device: 1e-5)
    lm = as_model(Slow(still, prompt=1e-2, tokens=(5e-4,)))
    result = measure_throughput(lm, batch_size=2, seq_len=10, runs=3, scaling=False)
    assert result.tokens_per_second > 0
    assert "decode_tokens_per_second" not in result.record.metrics
    assert "the clock ticks every 10 us" in result.record.details["failed"]["decode"]


def test_it_is_told_whether_a_model_was_timed_before_and_by_whom():
    lm = as_model(Functional())
    first, second = (measure_latency(lm, seq_len=4, runs=2, warm_up=0).record.details for _ in range(2))
    assert [(said["timed_before"], said["timed_by"]) for said in (first, second)] == [(False, "bare loop"), (True, "bare loop")]


def test_another_value_of_a_model_is_the_one_that_was_timed_and_another_step_is_not():
    def timed_before(lm):
        return measure_latency(lm, seq_len=4, runs=2, warm_up=0).record.details["timed_before"]

    lm = as_model(Functional())
    assert not timed_before(replace(lm, context_length=64))
    assert timed_before(lm)
    assert not timed_before(replace(lm, step_fn=lambda *given: lm.step_fn(*given)))
    assert not timed_before(as_model(Functional()))


@pytest.mark.parametrize("n", [8, 9, 20, 21, 26, 31, 75, 84, 100])
def test_the_interval_of_a_median_misses_it_in_five_of_a_hundred_at_most(n):
    metric = median("seconds", range(n))
    below = int(metric.low)  # samples that lie below it
    missed = 2 * sum(math.comb(n, k) for k in range(below + 1)) / 2**n
    assert missed <= 0.05 < missed + 2 * math.comb(n, below + 1) / 2**n


def test_a_stream_is_timed_chunk_by_chunk(still):
    result = measure_streaming(as_model(Slow(still, prompt=1e-3)), chunk_size=5, chunks=8, runs=2, warm_up=0)
    assert float(result.chunk_latency) == pytest.approx(5)
    assert result.chunk_latency.n == 14  # the first chunk has no state to read
    assert float(result.tokens_per_second) == pytest.approx(1000)
    assert float(result.slowdown) == pytest.approx(1)
    assert result.state_bytes.x == [5.0 * chunk for chunk in range(1, 9)]
    assert set(result.state_bytes.y) == {16 * 4.0}


class Tiring(Slow):
    """Each chunk takes a millisecond longer than the one before it."""

    def forward(self, input_ids, state=None):
        self.clock.now += 1e-3 * (0 if state is None else 1 + self.chunks)
        self.chunks = 0 if state is None else 1 + self.chunks
        return Functional.forward(self, input_ids, state)


def test_a_stream_that_gets_slower_is_seen(still):
    result = measure_streaming(as_model(Tiring(still)), chunk_size=5, chunks=17, runs=2, warm_up=0)
    assert float(result.slowdown) == pytest.approx((13 + 14 + 15 + 16) / (1 + 2 + 3 + 4))


def test_only_a_model_with_a_state_reads_a_stream():
    with pytest.raises(ProfilingError, match="no state to carry"):
        measure_streaming(as_model(Stateless()))


@pytest.mark.parametrize("measure", [measure_latency, measure_throughput, measure_streaming])
def test_where_nothing_is_timed_there_are_no_times(measure):
    result = measure(LM, batch_size=2, runner=NOT_TIMED)
    assert result.not_measured == "disabled"
    assert {metric.unit for metric in result.record.metrics.values()} <= {"bytes"}
    assert result.record.cost.flops > 0
    with pytest.raises(NotMeasuredError, match="disabled"):
        _ = (
            result.chunk_latency
            if measure is measure_streaming
            else result.tokens_per_second
            if measure is measure_throughput
            else result.e2e
        )


def test_a_clock_that_is_too_coarse_is_not_believed(monkeypatch):
    monkeypatch.setattr("pytest_lmeval.profiling._runner.tick", lambda device: 0.5)
    result = measure_latency(LM, seq_len=4, runs=3, warm_up=0)
    assert "the clock ticks every 5e+05 us" in result.not_measured
    assert result.record.metrics == {}


def test_what_the_clock_is_too_coarse_for_is_left_out_and_the_rest_is_kept(still, monkeypatch):
    monkeypatch.setattr("pytest_lmeval.profiling._runner.tick", lambda device: 1e-5)
    result = measure_latency(as_model(Slow(still, prompt=1e-2, tokens=(5e-4,))), seq_len=10, new_tokens=4, runs=3, warm_up=0)
    assert float(result.prefill) == pytest.approx(100)
    with pytest.raises(NotMeasuredError, match="itl takes 500 us and the clock ticks every 10 us"):
        result.itl  # noqa: B018
    assert not {"itl", "tpot", "decode_tokens_per_second"} & set(result.record.metrics)


def test_the_clock_tells_apart_less_than_a_microsecond():
    clock.tick.cache_clear()
    assert 0 < clock.tick("cpu") < 1e-6
    assert time.perf_counter() - clock.device_clock() < 1  # the same clock, as pytest-benchmark reads it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runs": 0}, "runs is 0: then there is nothing to measure"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seq_len": -1}, "seq_len is -1"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"warm_up": -1}, "warm_up is -1"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, said):
    with pytest.raises(ProfilingError, match=said):
        measure_latency(LM, **options)


def test_a_prompt_that_the_model_cannot_hold_is_refused():
    lm = replace(as_model(Functional()), context_length=16)
    assert measure_latency(lm, seq_len=9, new_tokens=8, runs=1, warm_up=0).e2e > 0
    with pytest.raises(ProfilingError, match="reads at most 16 tokens; 10 of a prompt and 7 that follow are more"):
        measure_latency(lm, seq_len=10, new_tokens=8, runs=1, warm_up=0)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_no_time_at_all_is_refused(seconds):
    with pytest.raises(ProfilingError, match="then there is nothing to measure"):
        measure_throughput(LM, seconds=seconds)


def test_nothing_is_kept_for_a_backward_pass_and_nothing_is_collected():
    seen = []

    class Watching(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            seen.append((logits.requires_grad, gc.isenabled()))
            return logits, state

    lm = as_model(Watching())
    seen.clear()
    measure_latency(lm, seq_len=4, runs=1, warm_up=0)
    assert set(seen) == {(False, False)}
    assert (torch.is_grad_enabled(), gc.isenabled()) == (True, True)


def test_the_number_of_threads_is_held_and_recorded():
    before = torch.get_num_threads()
    seen = []

    class Threaded(Functional):
        wanted = None

        def forward(self, input_ids, state=None):
            seen.append(torch.get_num_threads())
            if self.wanted:
                torch.set_num_threads(self.wanted)
            return super().forward(input_ids, state)

    module = Threaded()
    lm = as_model(module)
    seen.clear()
    assert measure_latency(lm, seq_len=4, runs=2, warm_up=0, threads=3).record.settings["threads"] == 3
    assert (set(seen), torch.get_num_threads()) == ({3}, before)
    module.wanted = before + 1
    with pytest.raises(ProfilingError, match=f"set the number of threads from {before} to {before + 1}"):
        measure_latency(lm, seq_len=4, runs=2, warm_up=0)
    assert torch.get_num_threads() == before
