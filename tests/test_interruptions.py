"""A run that is stopped in the middle keeps what it finished, and the next one goes on with the same final numbers."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys

import pytest
from test_plugin import metrics, run

SLOW = """
    import os, pathlib, signal, time
    from tiny import Tiny

    FOLDER, ORDER = pathlib.Path(".lmeval"), pathlib.Path("signal")

    def halfway():
        finished = any(b'"result"' in file.read_bytes() for file in FOLDER.glob("journal.jsonl"))
        return finished and any(FOLDER.glob("partial/*.pt"))

    class Slow(Tiny):
        '''As right as Tiny, and slow enough to be interrupted; says how often it was asked. Ends itself with the signal that is
        ordered, once the first test is done and a point of the second is saved.'''

        def forward(self, input_ids, state=None):
            if input_ids.shape[1] == 16:
                with open("steps", "a") as file:
                    file.write("x")
                time.sleep(0.01)
                if ORDER.exists() and halfway():
                    number = int(ORDER.read_text())
                    ORDER.unlink()
                    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
                    os.kill(os.getpid(), number)
            return super().forward(input_ids, state)
"""
TESTS = """
    import pytest
    from pytest_lmeval.records._journal import Saver

    @pytest.fixture(autouse=True)
    def save_often(monkeypatch):
        monkeypatch.setattr(Saver, "PAUSE", 0.05)
        monkeypatch.setattr(Saver, "SHARE", 1.0)

    def test_first(lmeval, lm, corpus):
        lmeval.perplexity(lm, corpus("text:text.txt"), chunk_size=16, tokens=400)

    def test_second(lmeval, lm, corpus):
        lmeval.perplexity(lm, corpus("text:text.txt"), chunk_size=16)
"""


@pytest.fixture
def slow(project, monkeypatch):
    project.makefile(".txt", text="It was a dark and stormy night; the rain fell in torrents.\n" * 25)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--lmeval-budget=0")  # the probe's steps are the same in every run
    project.makepyfile(slow=SLOW, test_slow=TESTS)
    return project


def numbers(pytester):
    return {
        record["test"]: (
            {name: metric for name, metric in record["metrics"].items() if name != "tokens_per_second"},
            {name: series for name, series in record["series"].items() if name != "chunk_seconds"},
        )
        for record in metrics(pytester)["records"]
    }


def steps(pytester):
    path = pytester.path / "steps"
    count = len(path.read_text()) if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


def interrupt(pytester, number, *options):
    """A run that is ended by this signal in its second test, after a point of it was saved."""
    (pytester.path / "signal").write_text(str(int(number)))
    result = run(pytester, *options, lm="slow:Slow")
    assert not (pytester.path / "signal").exists()
    return result


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_stopped_run_is_taken_up_with_the_same_final_numbers(slow, number):
    run(slow, lm="slow:Slow").assert_outcomes(passed=2)
    undisturbed, all_steps = numbers(slow), steps(slow)
    shutil.rmtree(slow.path / ".lmeval")

    stopped = interrupt(slow, number)
    assert stopped.ret in (-signal.SIGKILL, pytest.ExitCode.INTERRUPTED)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in stopped.stdout.str()
        assert [record["test"] for record in metrics(slow)["records"]] == ["test_slow.py::test_first"]
    before = steps(slow)

    result = run(slow, lm="slow:Slow")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "slow:Slow on text:text.txt?test?: result taken from an interrupted run",
            "slow:Slow on text:text.txt?test?: went on from token * of an interrupted run",
        ]
    )
    assert numbers(slow) == undisturbed
    assert steps(slow) < all_steps
    assert before < all_steps

    run(slow, lm="slow:Slow").assert_outcomes(passed=2)  # that run came to its end: this one measures anew
    assert steps(slow) > 0.95 * all_steps  # the probe takes what time it has: a few steps more or fewer


def test_fresh_does_not_go_on(slow):
    interrupt(slow, signal.SIGKILL)
    steps(slow)
    result = run(slow, "--lmeval-fresh", lm="slow:Slow")
    result.assert_outcomes(passed=2)
    assert "interrupted run" not in result.stdout.str()


def test_another_model_does_not_go_on_from_the_point_of_this_one(slow):
    interrupt(slow, signal.SIGKILL)
    (slow.path / "tiny.py").write_text((slow.path / "tiny.py").read_text().replace("manual_seed(0)", "manual_seed(1)"))
    result = run(slow, lm="slow:Slow")
    result.assert_outcomes(passed=2)
    assert "interrupted run" not in result.stdout.str()


def test_a_broken_last_line_of_the_journal_is_dropped_with_a_warning(slow):
    interrupt(slow, signal.SIGKILL)
    journal = slow.path / ".lmeval/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    result = run(slow, lm="slow:Slow")  # where warnings are errors, too
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(["*JournalWarning: *journal.jsonl, line 1 is broken and was dropped*"])


# ------------------------------------------------------------------------------------------- progress


def on_a_terminal(pytester, *options):
    """Everything that a run writes to a terminal of 120 columns."""
    main, side = pty.openpty()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--lm", "slow:Slow", *options]
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=pytester.path, stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    output = b""
    while select.select([main], [], [], 60)[0]:
        try:
            output += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    os.close(main)
    assert process.wait(timeout=60) == 0, output
    return output.decode()


def test_progress_is_shown_on_a_terminal_through_the_capture(slow):
    shown = on_a_terminal(slow, "-k", "first")
    assert "slow:Slow reads text:text.txt[test]:" in shown
    assert "perplexity " in shown
    assert "% " in shown
    assert " left" in shown
    assert "tokens/s" in shown


def test_in_a_pipe_there_is_no_progress(slow):
    result = run(slow, lm="slow:Slow")
    assert " left" not in result.stdout.str() + result.stderr.str()
    assert "\r" not in result.stdout.str() + result.stderr.str()


def test_the_golden_numbers_do_not_depend_on_the_order_of_tests(slow):
    run(slow, lm="slow:Slow").assert_outcomes(passed=2)
    forward = numbers(slow)
    run(slow, "test_slow.py::test_second", "test_slow.py::test_first", lm="slow:Slow").assert_outcomes(passed=2)
    assert json.dumps(numbers(slow), sort_keys=True) == json.dumps(forward, sort_keys=True)
