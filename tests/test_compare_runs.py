"""Pairs of runs in fresh processes judge speed, and only a difference that is certain and large enough counts."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from msgspec.structs import replace

from pytest_lmeval.__main__ import main
from pytest_lmeval.errors import SideError
from pytest_lmeval.gates import _compare_runs as compare_runs
from pytest_lmeval.gates._compare_runs import Key, Number, Side, add_arguments, compared, numbers, run_in_turns, side
from pytest_lmeval.records._comparison import Comparison
from pytest_lmeval.records._document import RunDocument, dump
from pytest_lmeval.records._measured import ModelFacts, Record
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.statistics._paired import log_ratio
from pytest_lmeval.statistics._student import quantile
from pytest_lmeval.statistics._verdict import judge_all

POSITIVE = st.floats(0.01, 100)
KEY = Key("test_speed.py::test_latency", "demo", "batch 1, 128 tokens", "itl")
THRESHOLD = np.log(1.05)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=20))
def test_the_log_ratio_of_swapped_sides_is_the_negative(pairs):
    base, new = zip(*pairs, strict=True)
    one, other = log_ratio(base, new), log_ratio(new, base)
    assert [one.value, one.low, one.high] == pytest.approx([-other.value, -other.high, -other.low], abs=1e-6)
    assert one.low <= one.value + 1e-9
    assert one.value <= one.high + 1e-9


def test_a_disturbance_of_both_runs_of_a_pair_cancels():
    machine = np.array([1.0, 1.8, 0.7, 1.3, 2.0, 0.9])
    found = log_ratio(machine, 1.1 * machine)
    assert [found.low, found.high] == pytest.approx([np.log(1.1)] * 2)
    unpaired = log_ratio(machine, 1.1 * machine[::-1])
    assert unpaired.low < 0 < unpaired.high


def test_the_interval_contains_the_truth_nineteen_times_in_twenty():
    draws = np.random.default_rng(0).normal(0, 0.03, (1000, 2, 6))
    found = [log_ratio(*np.exp(pair)) for pair in draws]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)


def judge(*found, up=False, level=0.05):
    n = len(found)
    return [one.name for one in judge_all(found, [THRESHOLD] * n, [up] * n, level=level, two_sided=True)]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.06, 1.12, "worse"), (1.01, 1.03, "same"), (0.99, 1.03, "same"), (0.97, 1.2, "unclear"), (0.85, 0.93, "better")],
)
def test_only_a_certain_and_large_difference_counts(low, high, verdict):
    middle, spread = np.log(low * high) / 2, np.log(high / low) / 2
    found = log_ratio([1.0] * 4, np.exp(middle + spread * np.array([-1, 1, -1, 1]) * np.sqrt(3) / quantile(3)))
    assert np.exp([found.low, found.high]) == pytest.approx([low, high])
    assert judge(found) == [verdict]
    assert judge(found, up=True) == [{"worse": "better", "better": "worse"}.get(verdict, verdict)]


def test_one_pair_is_unclear_and_times_must_be_positive():
    assert judge(log_ratio([1.0], [2.0])) == ["unclear"]
    with pytest.raises(ValueError, match="positive"):
        log_ratio([1.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize(("metrics", "noise"), [
    (8, 0.05), *(pytest.param(*one, marks=pytest.mark.thorough) for one in ((1, 0.05), (1, 0.2), (8, 0.2)))
])  # fmt: skip
def test_two_looks_raise_false_alarms_in_two_of_a_hundred_comparisons(metrics, noise):
    draws = np.exp(np.random.default_rng(0).normal(0, noise, (200, 2, metrics, 12)))
    alarms = eager = 0
    for base, new in draws:
        looks = [[log_ratio(b[:n], a[:n]) for b, a in zip(base, new, strict=True)] for n in range(6, 13)]
        alarms += any("worse" in judge(*looks[n], level=0.01) for n in (0, -1))
        eager += any(judge(one) == ["worse"] for look in looks for one in look)
    assert alarms / 200 <= 0.03
    assert eager / 200 > 0.03  # looking after every pair, at each number alone


class Drawn(Side):
    """Measures the given values, and records the order of the runs."""

    def __init__(self, name, values, order):
        super().__init__(name, None)
        self.values, self.order = iter(values), order

    def run(self, arguments):
        self.order.append(self.name)
        self.runs.append({KEY: Number(next(self.values), "ms", higher_is_better=False)})


def raced(base, new, *given):
    order, parser = [], argparse.ArgumentParser()
    add_arguments(parser)
    sides = Drawn("A", base, order), Drawn("B", new, order)
    run_in_turns(*sides, parser.parse_args(["--base", "main", *given]))
    return "".join(order), compared(*sides, 0.05)


def test_the_versions_take_turns_in_alternating_order(capsys):
    order, (row,) = raced([1.0, 1.01] * 6, [1.0, 1.01] * 6)
    assert (order, row.verdict) == ("ABBA" * 3, "same")
    assert "pair 6 of 6" in capsys.readouterr().err


def test_unclear_numbers_are_measured_again_up_to_a_limit():
    noise = np.exp(np.random.default_rng(1).normal(0, 0.3, 24))
    order, (row,) = raced(noise[:12], noise[12:])
    assert (len(order), row.verdict) == (24, "unclear")
    order, _ = raced(noise[:12], noise[12:], "--budget", "0")
    assert len(order) == 2


def test_numbers_that_some_run_lacks_are_listed_and_not_compared():
    one, other = Number(1.0, "ms", False), Key("test_speed.py::test_new", "demo", "batch 1", "itl")
    base, new = Side("main", None, runs=[{KEY: one}] * 2), Side("this version", None, runs=[{KEY: one, other: one}] * 2)
    rows = compared(base, new, 0.05)
    assert [row.key for row in rows] == [KEY]
    listed = "on one side only, or not in every run: test_speed.py::test_new (itl)"
    assert listed in compare_runs.lines(rows, base, new, 0.05)


def document(**speeds):
    metrics = {name: value_of(name, value) for name, value in speeds.items()}
    record = Record(test=KEY.test, lm=ModelFacts(spec=KEY.lm), kind="latency", subject=KEY.subject, metrics=metrics)
    return RunDocument(records=[record])


def test_only_medians_of_speed_are_compared():
    found = document(itl=2.0, itl_p95=2.0, accuracy=2.0)
    assert numbers(found) == {KEY: Number(2.0, "ms", False)}
    for margin, fraction in (("10 %", 0.1), ("0.5", 0.25)):
        gate = {"itl": Comparison(verdict="not judged", new=2.0, margin=margin)}
        assert numbers(RunDocument(records=[replace(found.records[0], gate=gate)]))[KEY].threshold == fraction


@pytest.fixture
def copying(tmp_path):
    """A Python that measures what a file metrics.json in the folder of its side says."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\ncp metrics.json ${6#--lmeval-dir=}\n")
    python.chmod(0o755)
    return str(python)


def test_another_schema_and_a_folder_without_git_are_refused(tmp_path, copying):
    (tmp_path / "metrics.json").write_text('{"schema": 1, "records": []}')
    with pytest.raises(SideError, match="this version cannot read what main measured"):
        Side("main", tmp_path, copying).run([])
    with pytest.raises(SideError, match="no git revision"), side("main", tmp_path):
        pass


TEST = """
    import pytest
    from torch import nn
    from pytest_lmeval import Value
    from speed import ITL

    @pytest.mark.lmeval_gate(latency="20%")
    def test_latency(lmeval):
        lmeval.record(nn.Embedding(256, 256), "prompt", itl=Value(ITL, "ms", higher_is_better=False))
"""


@pytest.fixture
def repository(pytester, monkeypatch):
    """A project whose last commit takes a tenth of the time."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(speed="ITL = 1.5", test_speed=TEST)
    pytester.makefile(".ini", pytest="[pytest]\npythonpath = .\n")
    Path("metrics.json").write_text(dump(document(itl=1.5)))
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "fast"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command], check=True, capture_output=True)
    pytester.makepyfile(speed="ITL = 15.0")
    Path("metrics.json").write_text(dump(document(itl=15.0)))


def worktrees():
    return len(subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout.splitlines())


def test_each_side_runs_in_its_own_folder_and_the_checkout_is_removed(repository, copying):
    new = Side("this version", Path.cwd(), copying)
    with side("HEAD", Path.cwd()) as base:
        base.python = copying
        assert worktrees() == 2
        for one in (base, new, new, base):
            one.run([])
    assert worktrees() == 1
    (row,) = compared(base, new, 0.05)
    line = "worse test_speed.py::test_latency itl 1.5 ms 15 ms 10.000 10.000 to 10.000"
    assert compare_runs.lines([row], base, new, 0.05)[1].split() == line.split()


@pytest.mark.thorough
def test_the_command_finds_a_slower_version(repository, capsys):
    options = ["--base", "HEAD", "--pairs", "2", "--most", "2", "--to", "runs.json", "--", "test_speed.py"]
    assert main(["compare-runs", *options]) == 1
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["verdict", "test", "metric", "HEAD", "this", "version", "ratio", "95", "%", "interval"]
    assert table[1].startswith("worse ")
    assert '"threshold": 0.2' in Path("runs.json").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--base", "no-such-branch"], r"no-such-branch is no Python environment and no git revision of .*fatal: "),
        (["--base", "HEAD", "--to", "nowhere/runs.json"], "No such file or directory, so the numbers would be lost"),
        (["--base", sys.executable, "--", "test_missing.py"], r"measured nothing: .*ended with status 4"),
        (["--base", "HEAD", "--pairs", "1"], "must be at least 2"),
        (["--base", "HEAD", "--threshold", "2"], "takes a fraction between 0 and 1"),
        (["--base", "HEAD", "--threshold", "abc"], "takes a fraction between 0 and 1"),
    ],
)
def test_impossible_comparisons_are_refused(repository, capsys, given, message):
    try:
        status = main(["compare-runs", *given])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
