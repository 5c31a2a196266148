"""What runs have measured is added up line by line, and a spoiled line costs only itself."""

import sys

import pytest
from documents import asked, document, reading
from hypothesis import given, strategies as st
from msgspec.structs import replace

from pytest_lmeval.records import _history as history
from pytest_lmeval.records._value import Value
from pytest_lmeval.report._history import section

KEY = ("t.py::test_task", "demo", "brackets", "accuracy")


def run(value, name="r1", **changes):
    found = document(asked(metrics={"accuracy": Value(value, "%", low=value, high=value, n=3)}, **changes))
    return replace(found, run=replace(found.run, id=name))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_statistics_are_those_of_all_runs(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("history")
    for number, value in enumerate(values):
        history.append(folder, run(value, f"r{number}"))
    found = history.statistics(history.read(folder)[0])[KEY]
    assert (found.runs, found.min, found.max, found.last) == (len(values), min(values), max(values), values[-1])
    assert found.mean == pytest.approx(sum(values) / len(values))


def test_lines_that_were_cut_off_or_damaged_are_left_out_and_counted(tmp_path):
    history.append(tmp_path, run(1.0))
    file = tmp_path / history.NAME
    (line,) = file.read_text().splitlines()
    damaged = [
        line[:-15],
        line.replace("1.0", "NaN"),
        line.replace("1.0", "1e999"),
        line.replace("2026-11", "soon"),
        "[" * 10**5,
    ]
    file.write_text("\n".join([line, *damaged, ""]))
    history.append(tmp_path, run(3.0))
    lines, (note,) = history.read(tmp_path)
    assert note == "5 lines of history.jsonl cannot be read, and are left out"
    assert history.statistics(lines)[KEY].mean == 2.0


def test_where_no_run_was_there_is_no_history(tmp_path):
    assert history.read(tmp_path) == ([], [])
    assert section(run(1.0), tmp_path) is None


def test_the_pages_show_a_number_among_those_of_other_runs_once_there_are_any(tmp_path):
    history.append(tmp_path, run(1.0))
    history.append(tmp_path, replace(document(reading()), run=replace(document().run, id="other")))
    assert section(run(1.0), tmp_path) is None
    history.append(tmp_path, run(3.0, "r2"))
    assert section(run(3.0), None) is None
    (row,) = section(run(3.0), tmp_path).rows
    assert row == ["t.py::test_task", "demo, brackets", "accuracy (%)", 2, 3.0, 2.0, 1.0, 3.0]


def test_a_run_of_pytest_leaves_its_numbers(pytester):
    pytester.makepyfile("def test_own(lmeval, lm):\n    lmeval.record(lm, 'passkey', accuracy=0.5)\n")
    for _ in range(2):
        pytester.runpytest_subprocess().assert_outcomes(passed=1)
    lines, _ = history.read(pytester.path / ".lmeval")
    assert [(line.lm, line.subject, line.metric, line.value) for line in lines] == 2 * [("demo", "passkey", "accuracy", 0.5)]
    assert lines[0].run != lines[1].run
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
