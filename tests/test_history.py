"""What runs have measured is added up line by line, and a spoiled line costs only itself."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lmeval.records import history

KEY = ("test_a.py::test_reads", "demo", "stdlib[test]", "perplexity")


def document(value, run="r1"):
    metric = {"value": value, "low": None, "high": None, "unit": "", "n": 3, "higher_is_better": False}
    return {
        "run": {"id": run, "started": "2026-01-01T00:00:00+00:00"},
        "environment": {"commit": None},
        "records": [
            {
                "test": KEY[0],
                "lm": {"spec": KEY[1]},
                "kind": "perplexity",
                "subject": KEY[2],
                "metrics": {KEY[3]: metric},
            }
        ],
    }


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_statistics_are_those_of_all_runs(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("history")
    for number, value in enumerate(values):
        history.append(folder, document(value, f"r{number}"))
    found = history.statistics(history.read(folder)[0])[KEY]
    assert (found.count, found.min, found.max, found.last) == (len(values), min(values), max(values), values[-1])
    assert found.mean == pytest.approx(sum(values) / len(values))


def test_a_line_that_was_cut_short_is_left_out_and_told(tmp_path):
    history.append(tmp_path, document(1.0))
    with (tmp_path / history.NAME).open("a") as file:
        file.write(json.dumps({"run": "r2", "test": "t"})[:15] + "\n")
    history.append(tmp_path, document(3.0))
    lines, (note,) = history.read(tmp_path)
    assert note == "1 lines of history.jsonl cannot be read, and are left out"
    assert history.statistics(lines)[KEY].mean == 2.0


def test_where_no_run_was_there_is_no_history(tmp_path):
    assert history.read(tmp_path) == ([], [])


def test_a_run_of_pytest_leaves_its_numbers(pytester):
    pytester.makepyfile("def test_own(lmeval, lm):\n    lmeval.record(lm, 'passkey', accuracy=0.5)\n")
    for _ in range(2):
        pytester.runpytest_subprocess().assert_outcomes(passed=1)
    lines, _ = history.read(pytester.path / ".lmeval")
    assert [(line["lm"], line["subject"], line["metric"], line["value"]) for line in lines] == 2 * [
        ("demo", "passkey", "accuracy", 0.5)
    ]
    assert lines[0]["run"] != lines[1]["run"]
    shown = pytester.run(sys.executable, "-m", "pytest_lmeval", "history", "--metric", "acc*")
    shown.stdout.fnmatch_lines(["*::test_own, demo, passkey", "*metric *runs *last *mean *min *max", "*accuracy * 2 * 0.5 *"])
    nothing = pytester.run(sys.executable, "-m", "pytest_lmeval", "history", "-k", "other")
    assert (nothing.ret, nothing.stderr.str().strip()) == (2, ".lmeval/history.jsonl holds no such number: 2 lines were read.")


def test_a_history_that_cannot_be_written_costs_only_itself(pytester):
    pytester.makepyfile("def test_own(lmeval, lm):\n    lmeval.record(lm, 'passkey', accuracy=0.5)\n")
    (pytester.path / ".lmeval" / history.NAME).mkdir(parents=True)
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*report.html", "nothing could be added to history.jsonl (*"])
