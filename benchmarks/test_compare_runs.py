"""Measure how often `lmeval compare-runs` finds a slowdown and how often it raises a false alarm, simulated and real.

The second version of a project of one file does a tenth more work: a planted slowdown of ten percent.
"""

import contextlib
import io
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pytest_lmeval.__main__ import main
from pytest_lmeval.gates._compare_runs import LEVEL, MOST, PAIRS, THRESHOLD
from pytest_lmeval.records._value import Value
from pytest_lmeval.statistics._paired import log_ratio
from pytest_lmeval.statistics._verdict import judge_all

pytestmark = pytest.mark.benchmark

MODEL = """
import torch
from torch import nn

torch.set_num_threads(1)

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 192)

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range({layers}):
            x = x @ self.embed.weight[:192]
        return x @ self.embed.weight.T
"""
TEST = "def test_prefill(lmeval, lm):\n    lmeval.latency(lm, seq_len=256, runs=60, warm_up=10)\n"


def git(*given):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *given], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "deep.py": MODEL.format(layers=100),
        "test_speed.py": TEST,
        "pytest.ini": "[pytest]\npythonpath = .\nlm = deep:Deep\n",
    }
    for name, text in files.items():
        Path(name).write_text(text)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "base")


def compare():
    """The exit status, and the table of verdicts."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        status = main(["compare-runs", "--base", "HEAD", "--threshold", "5%", "--", "test_speed.py"])
    return status, output.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("percent", [0, 10])
def test_only_a_planted_slowdown_is_found(lmeval, lm, project, percent):
    Path("deep.py").write_text(MODEL.format(layers=100 + percent))
    status, table = compare()
    verdict, shown, low, high = re.search(r"^(\w+) .* prefill .* (\S+)  (\S+) to (\S+)$", table, re.MULTILINE).groups()
    found = Value(float(shown), "x", low=float(low), high=float(high), higher_is_better=False)
    lmeval.record(lm, f"prefill, {percent} % slower: {verdict}", ratio=found, cores_busy=Value(os.getloadavg()[0]))
    assert status == (1 if percent else 0)
    assert (verdict == "worse") == bool(percent)


def looks(base, new):
    """Whether `compare-runs` calls a race [numbers, 12 pairs] worse: it looks after six pairs and after twelve."""
    return any(
        "worse" in verdicts([log_ratio(b[:n], a[:n]) for b, a in zip(base, new, strict=True)], LEVEL) for n in (PAIRS, MOST)
    )


def eager(base, new):
    """The same for looking after every pair, at each number alone, at its 95 % interval."""
    every = [[log_ratio(b[:n], a[:n])] for b, a in zip(base, new, strict=True) for n in range(PAIRS, MOST + 1)]
    return any("worse" in verdicts(one, 0.025) for one in every)


def verdicts(found, level):
    margins, better = [np.log1p(THRESHOLD)] * len(found), [False] * len(found)
    return [one.name for one in judge_all(found, margins, better, level=level, two_sided=True)]


WAYS = {
    "two looks": looks,
    "a look after every pair": eager,
    "last value + 5 %": lambda base, new: (new[:, 0] > 1.05 * np.exp(STORED.normal(0, np.log(base).std(), len(new)))).any(),
    "last value + 50 %": lambda base, new: (new[:, 0] > 1.5 * np.exp(STORED.normal(0, np.log(base).std(), len(new)))).any(),
}
STORED = np.random.default_rng(1)  # stored runs of another day


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("numbers", [1, 4, 8])
def test_false_alarms_are_rare_and_slowdowns_are_found(lmeval, lm, noise, numbers):
    """500 simulated races each; the two runs of a pair differ by `noise`, independently for each number."""
    draws = np.random.default_rng(0)
    alarms = {}
    for percent in (0, 10):
        base, new = np.exp(draws.normal(0, noise / np.sqrt(2), (2, 500, numbers, MOST)))
        new = (1 + percent / 100) * new
        for way, alarm in WAYS.items():
            alarms[way, percent] = np.mean([alarm(b, a) for b, a in zip(base, new, strict=True)])
    for way in WAYS:
        false, found = (Value(100 * alarms[way, percent], "%", n=500) for percent in (0, 10))
        lmeval.record(lm, f"{way}, {numbers} numbers, noise {noise:.0%}", false_alarms=false, slower_by_10_percent_found=found)
    assert alarms["two looks", 0] <= 0.03  # 2 %, and the uncertainty of 500 races
    if noise <= 0.05:
        assert alarms["two looks", 10] > 0.8
