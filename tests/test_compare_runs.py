"""Speed is judged by pairs of runs in fresh processes, and only a difference that is certain and large enough counts."""

import argparse
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, strategies as st
from msgspec.structs import replace

from pytest_lmeval.errors import SideError
from pytest_lmeval.gates import _compare_runs as compare_runs
from pytest_lmeval.gates._compare_runs import add_arguments, compared, race
from pytest_lmeval.gates._interleaved import Key, Number, Side, numbers, side
from pytest_lmeval.records._comparison import Comparison
from pytest_lmeval.records._document import RunDocument
from pytest_lmeval.records._measured import ModelFacts, Record
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.statistics._ratio import judge_all, quantile, ratio

POSITIVE = st.floats(0.01, 100)
KEY = Key("test_speed.py::test_latency", "demo", "batch 1, 128 tokens", "itl")


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=20))
def test_turned_round_the_ratio_is_its_inverse(pairs):
    base, new = zip(*pairs, strict=True)
    one, other = ratio(base, new), ratio(new, base)
    assert one.value * other.value == pytest.approx(1, rel=1e-6)
    assert (one.low * other.high, one.low <= one.value * (1 + 1e-9) and one.value <= one.high * (1 + 1e-9)) == (
        pytest.approx(1, rel=1e-6),
        True,
    )


def test_what_disturbs_both_runs_of_a_pair_disturbs_nothing():
    machine = np.array([1.0, 1.8, 0.7, 1.3, 2.0, 0.9])
    found = ratio(machine, 1.1 * machine)
    assert (found.low, found.high) == (pytest.approx(1.1), pytest.approx(1.1))
    unpaired = ratio(machine, 1.1 * machine[::-1])  # the broken twin: pairs that were not taken together
    assert unpaired.low < 1 < unpaired.high


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    draws = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        base, new = np.exp(draws.normal(0, 0.03, (2, 6)))
        found = ratio(base, 1.07 * new)
        held += found.low <= 1.07 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_the_quantiles_are_those_of_the_tables():
    assert [round(quantile(freedom), 3) for freedom in (1, 2, 5, 11, 120)] == [12.706, 4.303, 2.571, 2.201, 1.980]
    assert [round(quantile(freedom, 0.001), 3) for freedom in (5, 10)] == [5.893, 4.144]


def judge(found, threshold, up, level=0.05):
    return judge_all([found], [threshold], [up], level=level)[0]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.06, 1.12, "worse"), (1.01, 1.03, "same"), (0.99, 1.03, "same"), (0.97, 1.2, "unclear"), (0.85, 0.93, "better")],
)
def test_a_difference_counts_that_is_certain_and_large_enough(low, high, verdict):
    middle, spread = np.log(low * high) / 2, np.log(high / low) / 2
    logs = middle + spread * np.array([-1, 1, -1, 1]) * np.sqrt(3) / quantile(3)
    found = ratio([1.0] * 4, np.exp(logs))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert judge(found, 0.05, False) == verdict
    turned = {"worse": "better", "better": "worse"}
    assert judge(found, 0.05, True) == turned.get(verdict, verdict)


def test_one_pair_says_nothing():
    assert judge(ratio([1.0], [2.0]), 0.05, False) == "unclear"
    with pytest.raises(ValueError, match="positive"):
        ratio([1.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("noise", [0.05, 0.2])
@pytest.mark.parametrize("numbers", [1, 8])
def test_two_looks_at_any_number_of_numbers_raise_two_false_alarms_in_a_hundred_races(noise, numbers):
    draws = np.random.default_rng(0)
    alarms = eager = 0
    for _ in range(400):
        base, new = np.exp(draws.normal(0, noise, (2, numbers, 12)))
        looks = [[ratio(b[:n], a[:n]) for b, a in zip(base, new, strict=True)] for n in range(6, 13)]
        alarms += any("worse" in judge_all(looks[n], [0.05] * numbers, [False] * numbers, level=0.01) for n in (0, -1))
        eager += any(judge(one, 0.05, False) == "worse" for look in looks for one in look)
    assert alarms / 400 <= 0.03  # the broken twin looks after every pair, at each number alone:
    assert eager / 400 > 0.03


def arguments(*given):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--base", "main", *given])


class Drawn(Side):
    """Measures what it is told, and notes when."""

    def __init__(self, name, values, order):
        super().__init__(name, None)
        self.values, self.order = iter(values), order

    def run(self, arguments):
        self.order.append(self.name)
        self.runs.append({KEY: Number(next(self.values), "ms", higher_is_better=False)})


def raced(base, new, *given):
    order = []
    sides = Drawn("A", base, order), Drawn("B", new, order)
    race(*sides, arguments(*given))
    return "".join(order), compared(*sides, 0.05)


def test_the_versions_take_turns_and_the_order_is_turned_round(capsys):
    order, (row,) = raced([1.0, 1.01] * 6, [1.0, 1.01] * 6)
    assert (order, row.verdict) == ("ABBA" * 3, "same")
    assert "pair 6 of 6" in capsys.readouterr().err


def test_what_is_unclear_is_run_again_up_to_a_limit():
    noise = np.exp(np.random.default_rng(1).normal(0, 0.3, 24))
    order, (row,) = raced(noise[:12], noise[12:])
    assert (len(order), row.verdict) == (24, "unclear")
    order, _ = raced(noise[:12], noise[12:], "--budget", "0")
    assert len(order) == 2


def test_only_what_every_run_has_is_compared_and_the_rest_is_said():
    base, new = Side("main", None), Side("this version", None)
    other = Key("test_speed.py::test_new", "demo", "batch 1", "itl")
    base.runs = [{KEY: Number(1.0, "ms", False)}] * 2
    new.runs = [{KEY: Number(1.0, "ms", False), other: Number(2.0, "ms", False)}] * 2
    assert [row.key for row in compared(base, new, 0.05)] == [KEY]
    assert "on one side only, or not in every run: test_speed.py::test_new (itl)" in compare_runs.lines(
        compared(base, new, 0.05), base, new, 0.05
    )


def test_medians_of_speed_are_compared_and_nothing_else():
    lm, metrics = ModelFacts(spec="demo"), {name: value_of(name, 2.0) for name in ("itl", "itl_p95", "accuracy")}
    record = Record(test=KEY.test, lm=lm, kind="latency", subject=KEY.subject, metrics=metrics)
    assert numbers(RunDocument(records=[record])) == {KEY: Number(2.0, "ms", False)}
    for margin, share in (("10 %", 0.1), ("0.5", 0.25)):
        gate = {"itl": Comparison(verdict="not judged", new=2.0, margin=margin)}
        assert numbers(RunDocument(records=[replace(record, gate=gate)]))[KEY].threshold == share


def test_a_side_that_writes_another_schema_is_told(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho \'{"schema": 1, "records": []}\' > ${6#--lmeval-dir=}/metrics.json\n')
    python.chmod(0o755)
    with pytest.raises(SideError, match="main measured something, and wrote it so that this version cannot read it"):
        Side("main", tmp_path, str(python)).run([])


PAGE = """
    import torch
    from torch import nn

    LAYERS = {layers}

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(256, 32)

        def forward(self, ids):
            x = self.embed(ids)
            for _ in range(LAYERS):
                x = x @ torch.eye(32)
            return x @ self.embed.weight.T
"""
TEST = """
    import pytest

    @pytest.mark.lmeval_gate(latency="20%")
    def test_prefill(lmeval, lm):
        lmeval.latency(lm, seq_len=64, runs=20, warm_up=2)
"""


@pytest.fixture
def repository(pytester, monkeypatch):
    """A project with a revision before the present one, that does a tenth of the work."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def git(*given):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *given], check=True, capture_output=True)

    pytester.makepyfile(deep=PAGE.format(layers=40), test_speed=TEST)
    pytester.makefile(".ini", pytest="[pytest]\npythonpath = .\nlm = deep:Deep\n")
    git("init", "-q")
    git("add", "deep.py", "test_speed.py", "pytest.ini")
    git("commit", "-q", "-m", "as it was")
    pytester.makepyfile(deep=PAGE.format(layers=400))
    return pytester


def compare(repository, *given):
    return repository.run(sys.executable, "-m", "pytest_lmeval", "compare-runs", *given)


def test_a_slower_version_is_found_and_its_checkout_is_taken_away(repository):
    result = compare(repository, "--base", "HEAD", "--pairs", "3", "--most", "9", "--to", "runs.json", "--", "test_speed.py")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["verdict *HEAD *this version *", "worse *test_speed.py::test_prefill *prefill *"])
    assert '"threshold": 0.2' in (repository.path / "runs.json").read_text()
    listed = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--base", "no-such-branch"], "no-such-branch is no Python environment and no git revision of *fatal: *"),
        (["--base", "HEAD", "--to", "nowhere/runs.json"], "No such file or directory, so the numbers would be lost"),
        (["--base", sys.executable, "--", "test_missing.py"], "measured nothing: *ended with status 4"),
        (["--base", "HEAD", "--pairs", "1"], "at least 2 pairs"),
        (["--base", "HEAD", "--threshold", "2"], "takes a share between 0 and 1"),
        (["--base", "HEAD", "--threshold", "abc"], "takes a share between 0 and 1"),
    ],
)
def test_what_cannot_be_compared_is_said(repository, given, said):
    result = compare(repository, *given)
    assert result.ret == 2
    result.stderr.fnmatch_lines([f"*{said}*"])


def test_a_side_that_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(SideError, match="no git revision"), side("main", tmp_path):
        pass
