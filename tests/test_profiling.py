"""Times are taken, counted and summarized correctly; no test depends on how fast this machine is.

Where times matter, a clock stands still until the model moves it.
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
from pytest_lmeval.profiling._clock import device_clock, tick
from pytest_lmeval.profiling._runner import Runner
from pytest_lmeval.profiling._samples import median, runs_to_see, spread, stability

LM = as_model(Functional())
ONCE = {"runs": 1, "warm_up": 0}
TWICE = {"runs": 2, "warm_up": 0}


class Clock:
    """Stands still until a model moves it."""

    now = 0.0

    def advance(self, seconds):
        self.now += seconds

    def runner(self, tick=1e-9):
        return Runner(clock=lambda: self.now, tick=tick)


class Slow(Functional):
    """Takes `prompt` seconds for each token of a prompt, and for single tokens the seconds in `tokens`, one after the other."""

    def __init__(self, clock, *, prompt=1e-4, tokens=(2e-3,)):
        super().__init__()
        self.clock, self.prompt, self.tokens = clock, prompt, cycle(tokens)

    def forward(self, input_ids, state=None):
        self.clock.advance(next(self.tokens) if input_ids.shape[1] == 1 else self.prompt * input_ids.numel())
        return super().forward(input_ids, state)


class Counting(Functional):
    """Notes the shapes that it reads, and then does `then(input_ids, state)`."""

    def __init__(self, then=lambda input_ids, state: None):
        super().__init__()
        self.shapes, self.then = [], then

    def forward(self, input_ids, state=None):
        self.shapes.append(tuple(input_ids.shape))
        self.then(input_ids, state)
        return super().forward(input_ids, state)


def fails_at_four_rows(input_ids, state):
    if input_ids.shape[0] == 4 and input_ids.shape[1] > 1:
        raise RuntimeError("no kernel for four rows")


# ---------------------------------------------------------------------------------------------------- latency


def test_a_run_reads_the_prompt_once_and_decodes_token_by_token():
    module = Counting()
    lm = as_model(module)
    module.shapes.clear()
    result = measure_latency(lm, batch_size=3, seq_len=20, new_tokens=4, runs=5, warm_up=2)
    assert module.shapes == [(3, 20), (3, 1), (3, 1), (3, 1)] * (7 + 1)  # the last run counts operations
    assert (result.prefill.n, result.ttft.n, result.itl.n, result.tpot.n, result.e2e.n) == (5, 5, 15, 5, 5)
    assert result.record.cost.state_bytes == 3 * 16 * 4


def test_known_times_are_reported_exactly():
    lm = as_model(Slow(clock := Clock(), prompt=1e-3, tokens=(2e-3, 4e-3, 9e-3)))
    result = measure_latency(lm, seq_len=10, new_tokens=4, runs=20, warm_up=0, runner=clock.runner())
    values = (result.prefill, result.ttft, result.itl, result.tpot, result.e2e)
    assert list(map(float, values)) == pytest.approx([10, 10, 4, 5, 25])
    assert float(result.record.metrics["prefill_tokens_per_second"]) == pytest.approx(1000)
    assert float(result.record.metrics["decode_tokens_per_second"]) == pytest.approx(200)
    assert float(result.record.metrics["cold"]) == pytest.approx(25)
    assert result.record.cost.seconds == pytest.approx(20 * 0.025)


@pytest.mark.parametrize("slow_percent", [4, 7, 11])  # at 5 and 10, a percentile lies between two times
def test_a_percentile_is_the_time_that_so_many_steps_stay_below(slow_percent):
    steps = [20e-3] * slow_percent + [1e-3] * (100 - slow_percent)
    lm = as_model(Slow(clock := Clock(), tokens=steps))
    result = measure_latency(lm, seq_len=2, new_tokens=101, runs=2, warm_up=0, runner=clock.runner())
    for percent in (90, 95):
        assert float(result.percentile("itl", percent)) == pytest.approx(20 if slow_percent > 100 - percent else 1)


def test_the_first_run_is_reported_separately():
    lm = as_model(Slow(clock := Clock()))
    lm.module.tokens = cycle((0.5, *[1e-3] * 999))
    result = measure_latency(lm, seq_len=2, new_tokens=2, runs=10, warm_up=3, runner=clock.runner())
    assert float(result.record.metrics["cold"]) == pytest.approx(500.2)
    assert float(result.record.metrics["e2e_max"]) == pytest.approx(1.2)


def test_of_a_model_without_a_state_only_the_prefill_is_timed():
    lm = as_model(Stateless())
    result = measure_latency(lm, seq_len=16, **TWICE)
    assert result.prefill > 0
    assert "itl" not in result.record.metrics
    with pytest.raises(ProfilingError, match="no state to carry"):
        measure_streaming(lm)


# ---------------------------------------------------------------------------------------------------- summaries


def test_a_percentile_needs_enough_samples():
    values = list(range(1, 1001))
    assert "x_p90" in spread("x", values[:100])
    assert "x_p90" not in spread("x", values[:99])
    assert "x_p95" not in spread("x", values[:199])
    assert float(spread("x", values)["x_p99"]) == pytest.approx(990, abs=1)
    with pytest.raises(KeyError):
        measure_latency(LM, seq_len=4, **TWICE).percentile("prefill", 99)


def test_the_median_has_an_interval_from_eight_samples_on():
    assert median("seconds", [1.0] * 7).interval is None
    value = median("ttft", [5, 1, 4, 2, 3, 9, 8, 7, 6])  # seconds, of a metric in milliseconds
    assert (float(value), value.unit, value.low <= 5000 <= value.high, value.n) == (5000.0, "ms", True, 9)


@pytest.mark.parametrize("n", [8, 9, 20, 21, 26, 31, 75, 84, 100])
def test_the_interval_of_a_median_misses_it_with_a_probability_of_five_percent_at_most(n):
    below = int(median("seconds", range(n)).low)  # number of samples below the interval
    missed = 2 * sum(math.comb(n, k) for k in range(below + 1)) / 2**n
    assert missed <= 0.05 < missed + 2 * math.comb(n, below + 1) / 2**n


def test_the_spread_of_the_times_grades_the_machine():
    assert stability([1.0] * 7) is None
    assert stability([1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 50.0]) == "steady"  # one disturbed run is no disturbed machine
    assert stability([1.0, 1.2, 1.0, 1.2, 1.0, 1.2, 1.0, 1.2]) == "fluctuating"
    assert stability([1.0, 2.0] * 4) == "disturbed"


def test_the_runs_that_a_difference_needs_show_it_four_times_in_five():
    generator = torch.Generator().manual_seed(0)
    pilot = (100 + 10 * torch.randn(4000, generator=generator)).tolist()
    runs = runs_to_see(pilot, 0.05)
    assert runs == pytest.approx(2 * (2.8 * 0.1 / 0.05) ** 2, rel=0.1)
    base, slower = ((mean + 10 * torch.randn(2000, runs, generator=generator)).mean(1) for mean in (100.0, 105.0))
    seen = (slower - base) / (10 * (2 / runs) ** 0.5) > 1.96
    assert float(seen.float().mean()) == pytest.approx(0.8, abs=0.04)


# --------------------------------------------------------------------------------------------------- throughput


def test_throughput_counts_the_tokens_of_the_batch():
    lm = as_model(Slow(clock := Clock(), prompt=1e-3))
    result = measure_throughput(lm, batch_size=6, seq_len=10, runs=4, warm_up=1, runner=clock.runner())
    assert float(result.tokens_per_second) == pytest.approx(1000)
    assert float(result.record.metrics["sustained_tokens_per_second"]) == pytest.approx(1000)
    assert float(result.decode_tokens_per_second) == pytest.approx(6 / 2e-3)
    assert result.batch_scaling.x == [1.0, 2.0, 4.0, 6.0]
    assert result.record.cost.tokens == 4 * 60
    timed = measure_throughput(lm, batch_size=2, seq_len=10, seconds=0.5, scaling=False, runner=clock.runner())
    assert timed.record.cost.seconds == pytest.approx(0.5)
    assert timed.tokens_per_second.n == 25


def test_the_knee_is_where_more_rows_stop_helping():
    clock = Clock()
    lm = as_model(Counting(lambda input_ids, state: clock.advance(1e-2 * max(1, len(input_ids) / 8))))  # eight rows cost one
    result = measure_throughput(lm, batch_size=32, seq_len=4, runs=3, runner=clock.runner())
    assert result.batch_scaling.y == pytest.approx([400, 800, 1600, 3200, 3200, 3200])
    assert float(result.knee) == 8
    assert float(result.record.metrics["decode_knee_rows"]) == 8


def test_a_batch_size_at_which_a_model_fails_does_not_cost_the_others():
    lm = as_model(Counting(fails_at_four_rows))
    result = measure_throughput(lm, batch_size=8, seq_len=4, runs=2)
    assert result.batch_scaling.x == [1.0, 2.0, 8.0]
    assert "no kernel for four rows" in result.record.details["failed"]["4"]
    failing = measure_throughput(lm, batch_size=4, seq_len=4, runs=2)
    assert failing.batch_scaling.x == [1.0, 2.0]
    with pytest.raises(ProfilingError, match=r"failed at batch 4, 4 tokens, .*no kernel for four rows"):
        failing.tokens_per_second  # noqa: B018


def test_a_batch_that_can_be_read_but_not_decoded_keeps_its_reading_rate():
    def fails_to_decode(input_ids, state):
        if state is not None and len(input_ids) == 4:
            raise RuntimeError("no kernel for one token of four rows")

    result = measure_throughput(as_model(Counting(fails_to_decode)), batch_size=4, seq_len=8, runs=2, scaling=False)
    assert result.tokens_per_second > 0
    assert "no kernel for one token" in result.record.details["failed"]["decode"]
    assert result.record.notes[-1] == "failed: decode"


def test_rates_of_a_model_that_reads_frames_are_of_frames():
    frames = load("zoo:moshi")
    waits = measure_latency(frames, seq_len=2, new_tokens=2, **ONCE).record.metrics
    assert waits["decode_tokens_per_second"].unit == "frames/s"
    result = measure_throughput(frames, batch_size=2, seq_len=2, runs=1, new_tokens=2)
    assert (result.tokens_per_second.unit, result.batch_scaling.y_unit) == ("frames/s", "frames/s")
    assert measure_streaming(frames, chunk_size=2, chunks=4, runs=1).tokens_per_second.unit == "frames/s"
    assert measure_throughput(LM, batch_size=2, seq_len=2, runs=1).tokens_per_second.unit == "tokens/s"


# ---------------------------------------------------------------------------------------------------- the grid


def test_a_cell_of_a_grid_that_fails_says_why_and_the_others_are_measured():
    lm = as_model(Counting(fails_at_four_rows))
    grid = measure_latency_grid(lm, batch_sizes=(1, 4, 8), seq_lens=(4, 8), **TWICE)
    assert set(grid) == {(rows, tokens) for rows in (1, 4, 8) for tokens in (4, 8)}
    assert set(grid.failed) == {(4, 4), (4, 8)}
    assert grid[8, 8].ttft > 0
    with pytest.raises(ProfilingError, match="no kernel"):
        grid[4, 8].ttft  # noqa: B018


def test_a_grid_without_cells_and_options_that_fit_no_cell_are_refused():
    with pytest.raises(ProfilingError, match="no cells"):
        measure_latency_grid(LM, batch_sizes=())
    with pytest.raises(TypeError, match="unexpected keyword argument 'run'"):
        measure_latency_grid(LM, run=3)
    with pytest.raises(ProfilingError, match="runs is 0"):
        measure_latency_grid(LM, runs=0)


def test_after_a_lost_device_the_remaining_cells_fail_and_what_was_measured_is_kept():
    lost = []

    def loses_its_device(input_ids, state):
        if lost or len(input_ids) == 2:
            lost.append(True)
            raise RuntimeError("CUDA error: device-side assert triggered")

    lm, kept = as_model(Counting(loses_its_device)), []
    grid = measure_latency_grid(lm, batch_sizes=(1, 2, 4), seq_lens=(4,), **TWICE, keep=lambda cell: kept.append(cell) or cell)
    failures = [cell.record.details.get("failure") for cell in kept]
    assert failures == [None, *2 * ["device lost: CUDA error: device-side assert triggered"]]
    assert grid[1, 4].ttft > 0
    assert len(lost) == 1  # nothing is tried on a device that is lost


# --------------------------------------------------------------------------------------------------- streaming


def test_a_stream_is_timed_chunk_by_chunk():
    lm = as_model(Slow(clock := Clock(), prompt=1e-3))
    result = measure_streaming(lm, chunk_size=5, chunks=8, **TWICE, runner=clock.runner())
    assert float(result.chunk_latency) == pytest.approx(5)
    assert result.chunk_latency.n == 14  # the first chunk has no state to read
    assert float(result.tokens_per_second) == pytest.approx(1000)
    assert float(result.slowdown) == pytest.approx(1)
    assert result.state_bytes.x == [5.0 * chunk for chunk in range(1, 9)]
    assert set(result.state_bytes.y) == {16 * 4.0}


class Tiring(Slow):
    """Each chunk takes a millisecond longer than the one before it."""

    def forward(self, input_ids, state=None):
        self.clock.advance(1e-3 * (0 if state is None else 1 + self.chunks))
        self.chunks = 0 if state is None else 1 + self.chunks
        return Functional.forward(self, input_ids, state)


def test_a_stream_that_slows_down_is_detected():
    lm = as_model(Tiring(clock := Clock()))
    result = measure_streaming(lm, chunk_size=5, chunks=17, **TWICE, runner=clock.runner())
    assert float(result.slowdown) == pytest.approx((13 + 14 + 15 + 16) / (1 + 2 + 3 + 4))


# ------------------------------------------------------------------------------- what is not timed, and conditions


@pytest.mark.parametrize(
    ("measure", "number"),
    [(measure_latency, "e2e"), (measure_throughput, "tokens_per_second"), (measure_streaming, "chunk_latency")],
)
def test_where_nothing_is_timed_there_are_no_times_and_operations_are_counted(measure, number):
    shape = {"chunk_size": 4} if measure is measure_streaming else {"seq_len": 4}
    result = measure(LM, batch_size=2, **shape, runner=Runner(not_measured="disabled"))
    assert result.not_measured == "disabled"
    assert {metric.unit for metric in result.record.metrics.values()} <= {"bytes"}
    assert result.record.cost.flops > 0
    with pytest.raises(NotMeasuredError, match="disabled"):
        getattr(result, number)


def test_times_that_are_too_short_for_the_clock_are_left_out_and_the_others_are_kept():
    lm = as_model(Slow(clock := Clock(), prompt=1e-2, tokens=(5e-4,)))
    latency = measure_latency(lm, seq_len=10, new_tokens=4, **TWICE, runner=clock.runner(tick=1e-5))
    assert float(latency.prefill) == pytest.approx(100)
    with pytest.raises(NotMeasuredError, match="itl takes 500 us and the clock ticks every 10 us"):
        latency.itl  # noqa: B018
    assert not {"itl", "tpot", "decode_tokens_per_second"} & set(latency.record.metrics)
    assert latency.record.notes == ["too short for the clock: itl, tpot"]
    options = {"batch_size": 2, "seq_len": 10, "runs": 3, "scaling": False}
    throughput = measure_throughput(lm, **options, runner=clock.runner(tick=1e-5))
    assert throughput.tokens_per_second > 0
    with pytest.raises(NotMeasuredError, match="decode takes 500 us and the clock ticks every 10 us"):
        throughput.decode_tokens_per_second  # noqa: B018
    nothing = measure_latency(lm, seq_len=10, **TWICE, runner=clock.runner(tick=0.5))
    assert "the clock ticks every 5e+05 us" in nothing.not_measured
    assert nothing.record.metrics == {}


def test_the_clock_resolves_less_than_a_microsecond():
    assert 0 < tick("cpu") < 1e-6
    assert time.perf_counter() <= device_clock() <= time.perf_counter()  # the same clock, as pytest-benchmark reads it


def test_the_record_says_whether_this_process_has_timed_the_step_before_and_who_called_it():
    def details(lm):
        return measure_latency(lm, seq_len=4, **TWICE).record.details

    lm = as_model(Functional())
    first = details(replace(lm, context_length=64))
    assert (first["timed_before"], first["timed_by"]) == (False, "bare loop")
    assert details(lm)["timed_before"]  # the same step
    assert not details(replace(lm, step_fn=lambda *given: lm.step_fn(*given)))["timed_before"]


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (measure_latency, {"runs": 0}, "runs is 0, so there is nothing to measure"),
        (measure_latency, {"batch_size": 0}, "batch_size is 0"),
        (measure_latency, {"seq_len": -1}, "seq_len is -1"),
        (measure_latency, {"new_tokens": 0}, "new_tokens is 0"),
        (measure_latency, {"warm_up": -1}, "warm_up is -1"),
        (measure_latency, {"threads": 0}, "threads is 0"),
        (measure_throughput, {"new_tokens": 0}, "new_tokens is 0"),
        *((measure_throughput, {"seconds": seconds}, "nothing to measure") for seconds in (0, -1, math.nan, math.inf)),
        (measure_streaming, {"chunks": 3}, "chunks is 3; it is at least 4"),
    ],
)
def test_what_cannot_be_timed_is_refused(measure, options, message):
    with pytest.raises(ProfilingError, match=message):
        measure(LM, **options)


def test_a_prompt_that_the_model_cannot_hold_is_refused():
    lm = replace(as_model(Functional()), context_length=16)
    assert measure_latency(lm, seq_len=9, new_tokens=8, **ONCE).e2e > 0
    with pytest.raises(ProfilingError, match="reads at most 16 tokens, fewer than a prompt of 10 and the 7 that follow it"):
        measure_latency(lm, seq_len=10, new_tokens=8, **ONCE)


def test_a_run_has_a_fixed_number_of_threads_takes_no_gradients_and_collects_no_garbage():
    def conditions():
        return torch.is_grad_enabled(), gc.isenabled(), torch.get_num_threads()

    before, seen = torch.get_num_threads(), set()
    lm = as_model(Counting(lambda input_ids, state: seen.add(conditions())))
    seen.clear()
    assert measure_latency(lm, seq_len=4, **TWICE, threads=3).record.settings["threads"] == 3
    assert (seen, conditions()) == ({(False, False, 3)}, (True, True, before))
    changing = as_model(Counting(lambda input_ids, state: torch.set_num_threads(before + 1)))
    torch.set_num_threads(before)
    with pytest.raises(ProfilingError, match=f"changed the number of threads from {before} to {before + 1}"):
        measure_latency(changing, seq_len=4, **TWICE)
    assert torch.get_num_threads() == before
