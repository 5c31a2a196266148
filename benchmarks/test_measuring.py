"""Check measured times against models whose steps take a known time, what measuring adds to a step, and how runs differ.

The true time is what the model itself measures within its step, on the same clock.
"""

import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from pytest_lmeval import Value, as_model
from pytest_lmeval.measures._latency import measure_latency
from pytest_lmeval.profiling._samples import runs_to_see

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("one_thread")]

VOCAB = 32


class Timed(nn.Module):
    """Spends a given time on every step, and notes how much it was."""

    def __init__(self, spend):
        super().__init__()
        self.logits, self.spend, self.spent = nn.Parameter(torch.zeros(1, 8, VOCAB)), spend, []

    def forward(self, input_ids, state=None):
        began = time.perf_counter()
        self.spend(len(self.spent))
        logits = self.logits[:, : input_ids.shape[1]]
        self.spent.append(time.perf_counter() - began)
        return logits, self.logits


def sleeping(seconds):
    return lambda step: time.sleep(seconds)


def counting(seconds):
    """A busy loop, calibrated here to take this long."""
    rounds = 10_000
    while True:
        began = time.perf_counter()
        sum(range(rounds))
        took = time.perf_counter() - began
        if took > 0.01:
            break
        rounds *= 2
    return lambda step: sum(range(round(rounds * seconds / took)))


def bare_loop(model, tokens):
    """Seconds of each step without a harness: the model, and the likeliest token."""
    ids, times = torch.zeros(1, 8, dtype=torch.long), []
    with torch.no_grad():
        logits, state = model(ids)
        for _ in range(tokens):
            token = logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter())
            logits, state = model(token, state)
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize("way", [sleeping, counting])
@pytest.mark.parametrize(("milliseconds", "runs"), [(2, 60), (20, 12), (200, 3)])
def test_a_step_of_known_length_is_reported_within_one_percent(lmeval, way, milliseconds, runs):
    """True is the model's own time, plus what a bare loop takes beside it, measured before and after."""
    model = Timed(way(milliseconds / 1e3))

    def beside():
        model.spent.clear()
        gaps = bare_loop(model, 2 * runs)
        return statistics.median(gap - spent for gap, spent in zip(gaps, model.spent[1:], strict=False))

    before = beside()
    model.spent.clear()
    result = lmeval.latency(model, seq_len=8, new_tokens=8, runs=runs, warm_up=1)
    steps = [model.spent[8 * run + step] for run in range(-runs - 1, -1) for step in range(1, 8)]  # the last run is not timed
    parts = {"spent": statistics.median(steps), "before": before, "after": beside()}
    values = {name: Value(1e3 * seconds, "ms") for name, seconds in parts.items()}
    true = Value(values["spent"] + (values["before"] + values["after"]) / 2, "ms", n=len(steps))
    lmeval.record(model, f"{way.__name__} for {milliseconds} ms", reported=result.itl, true=true, **values)
    assert float(result.itl) == pytest.approx(true, rel=0.01, abs=abs(values["before"] - values["after"]))


def test_a_percentile_is_that_of_the_true_step_times(lmeval):
    lengths = np.random.default_rng(0).lognormal(np.log(2e-3), 0.5, 4000)
    model = Timed(lambda step: time.sleep(lengths[step]))
    result = lmeval.latency(model, seq_len=8, new_tokens=41, runs=20, warm_up=1)
    steps = 1e3 * np.array([model.spent[run * 41 + step] for run in range(-21, -1) for step in range(1, 41)])
    around = [float(np.quantile(steps, level)) for level in (0.94, 0.95, 0.96)]
    p95, true = result.percentile("itl", 95), Value(around[1], "ms", low=around[0], high=around[2])
    lmeval.record(model, "steps of many lengths", reported_p95=p95, true_p95=true)
    assert around[0] <= p95 <= around[2]


def until(seconds):
    """A busy loop that ends on time, so that the time around it can be measured."""

    def spend(step):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return spend


def test_measuring_adds_less_than_two_percent_to_a_step_of_a_millisecond(lmeval):
    model = Timed(until(1e-3))
    lm, tokens = as_model(model), 64
    bare, ours = [], []
    for _ in range(12):  # by turns, since the machine changes from second to second
        bare.append(statistics.mean(bare_loop(model, tokens)))
        ours.append(measure_latency(lm, seq_len=8, new_tokens=tokens + 1, runs=1, warm_up=0).tpot / 1e3)
    added = statistics.median(o - b for o, b in zip(ours, bare, strict=True))
    lmeval.record(
        model,
        "what measuring adds to a step of 1 ms",
        bare_step=Value(1e3 * statistics.median(bare), "ms"),
        measured_step=Value(1e3 * statistics.median(ours), "ms"),
        added=Value(1e6 * added, "us", n=12, higher_is_better=False),
        added_percent=Value(100 * added / 1e-3, "%", n=12, higher_is_better=False),
    )
    assert added < 20e-6


FRESH = """
import json, torch
torch.set_num_threads(1)
from pytest_lmeval import latency, load
result = latency(load("demo"), seq_len=128, runs=40)
print(json.dumps([float(result.tpot), result.samples["tpot"]]))
"""


def test_how_far_runs_differ_within_a_process_and_between_processes(lmeval, lm):
    """Two processes differ by more than two runs of one: a comparison of speeds has to allow for that."""
    command = [sys.executable, "-c", FRESH]
    found = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(8)]
    within = [np.std(runs, ddof=1) / np.mean(runs) for _, runs in found]
    medians = [middle for middle, _ in found]
    lmeval.record(
        lm,
        "time per output token, 8 processes of 40 runs",
        tpot=Value(statistics.median(medians), "ms", n=8),
        spread_within=Value(100 * statistics.median(within), "%", n=40),
        spread_between=Value(100 * np.std(medians, ddof=1) / np.mean(medians), "%", n=8),
        runs_for_5_percent=Value(statistics.median(runs_to_see(runs) for _, runs in found), n=40),
        processes_for_5_percent=Value(runs_to_see(medians), n=8),
    )
    assert max(medians) < 3 * min(medians)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: events are not stamped here")
def test_an_event_at_every_token_costs_little_on_a_gpu(lmeval, load_lm):
    """An event a token and one wait at the end, beside a wait at every token, and no marks at all."""
    lm = load_lm("demo")
    ids, device = lm.random_ids(1, 128), lm.device

    def decode(waits):
        with torch.no_grad():
            _, state = lm.step(ids, None, keep=1)
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            for _ in range(64):
                _, state = lm.step(ids[:, :1], state, keep=1)
                if waits:
                    torch.cuda.synchronize(device)
            torch.cuda.synchronize(device)
            return (time.perf_counter() - began) / 64

    decode(False)
    times = {"bare": [], "events": [], "waiting": []}
    for _ in range(20):
        times["bare"].append(decode(False))
        times["waiting"].append(decode(True))
        times["events"].append(measure_latency(lm, seq_len=128, new_tokens=65, runs=1, warm_up=0).tpot / 1e3)
    found = {name: Value(1e3 * statistics.median(taken), "ms", n=20) for name, taken in times.items()}
    lmeval.record(lm, "a step", **found)
    assert found["events"] < 1.2 * found["bare"]
