"""The history adds up the numbers of all runs of a folder; a damaged line costs only itself."""

import pytest
from documents import document, perplexity_of, task_of
from hypothesis import given, strategies as st
from msgspec.structs import replace

from pytest_lmeval.__main__ import main
from pytest_lmeval.records import _history as history
from pytest_lmeval.records._value import Value
from pytest_lmeval.report._history import section

KEY = ("t.py::test_task", "demo", "brackets", "accuracy")


def run(value, name="r1"):
    found = document(task_of(metrics={"accuracy": Value(value, "%", low=value, high=value, n=3)}))
    return replace(found, run=replace(found.run, id=name))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_statistics_cover_all_runs(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("history")
    for number, value in enumerate(values):
        history.append(folder, run(value, f"r{number}"))
    found = history.statistics(history.read(folder)[0])[KEY]
    assert (found.runs, found.min, found.max, found.last) == (len(values), min(values), max(values), values[-1])
    assert found.mean == pytest.approx(sum(values) / len(values))


def test_truncated_and_damaged_lines_are_ignored_and_counted(tmp_path):
    history.append(tmp_path, run(1.0))
    file = tmp_path / history.NAME
    (line,) = file.read_text().splitlines()
    edits = [("1.0", "NaN"), ("1.0", "1e999"), ("2026-11", "soon")]
    damaged = [line[:-15], *(line.replace(*edit) for edit in edits), "[" * 10**5]
    file.write_text("\n".join([line, *damaged, ""]))
    history.append(tmp_path, run(3.0))
    lines, (note,) = history.read(tmp_path)
    assert note == "5 lines of history.jsonl cannot be read and are ignored"
    assert history.statistics(lines)[KEY].mean == 2.0


def test_pages_show_statistics_once_another_run_measured_the_number(tmp_path):
    assert history.read(tmp_path) == ([], [])
    assert section(run(1.0), tmp_path) is None
    history.append(tmp_path, run(1.0))
    history.append(tmp_path, replace(document(perplexity_of()), run=replace(document().run, id="other")))
    assert section(run(1.0), tmp_path) is None
    history.append(tmp_path, run(3.0, "r2"))
    assert section(run(3.0), None) is None
    (row,) = section(run(3.0), tmp_path).rows
    assert row == ["t.py::test_task", "demo, brackets", "accuracy (%)", 2, 3.0, 2.0, 1.0, 3.0]


def test_each_pytest_run_appends_its_numbers_and_the_command_shows_them(pytester, capsys):
    pytester.makepyfile("def test_own(lmeval, lm):\n    lmeval.record(lm, 'passkey', accuracy=0.5)\n")
    for _ in range(2):
        pytester.runpytest_subprocess().assert_outcomes(passed=1)
    lines, _ = history.read(pytester.path / ".lmeval")
    assert [(line.lm, line.subject, line.metric, line.value) for line in lines] == 2 * [("demo", "passkey", "accuracy", 0.5)]
    assert lines[0].run != lines[1].run
    capsys.readouterr()
    assert main(["history", "--metric", "acc*"]) == 0
    heading, columns, numbers = capsys.readouterr().out.split("\n")[1:4]
    assert heading.endswith("::test_own, demo, passkey")
    assert columns.split() == ["metric", "runs", "last", "mean", "min", "max"]
    assert numbers.split()[:3] == ["accuracy", "2", "0.5"]
    assert main(["history", "-k", "other"]) == 2
    assert ".lmeval/history.jsonl holds no matching number among 2 lines." in capsys.readouterr().err


def test_a_history_that_cannot_be_written_costs_only_itself(pytester):
    pytester.makepyfile("def test_own(lmeval, lm):\n    lmeval.record(lm, 'passkey', accuracy=0.5)\n")
    (pytester.path / ".lmeval" / history.NAME).mkdir(parents=True)
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*report.html", "nothing could be added to history.jsonl (*"])
