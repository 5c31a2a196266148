"""A run that is interrupted keeps what it finished, and the next one resumes with the same final numbers."""

import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios

import pytest
from test_plugin import metrics, run

thorough = pytest.mark.thorough

SLOW = """
    import os, pathlib, signal, time
    from tiny import Tiny

    FOLDER, ORDER = pathlib.Path(".lmeval"), pathlib.Path("signal")

    def halfway():
        finished = any(b'"result"' in file.read_bytes() for file in FOLDER.glob("journal.jsonl"))
        return finished and any(FOLDER.glob("partial/*.pt"))

    class Slow(Tiny):
        '''Counts its steps. Sends itself the ordered signal after the first test and a checkpoint of the second.'''

        def forward(self, input_ids, state=None):
            if input_ids.shape[1] == 16:
                with open("steps", "a") as file:
                    file.write("x")
                time.sleep(float(os.environ.get("PAUSE", 0)))
                if ORDER.exists() and halfway():
                    number = int(ORDER.read_text())
                    ORDER.unlink()
                    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
                    os.kill(os.getpid(), number)
            return super().forward(input_ids, state)
"""
TESTS = """
    import pytest
    from pytest_lmeval.records._journal import Saver

    @pytest.fixture(autouse=True)
    def save_every_chunk(monkeypatch):
        monkeypatch.setattr(Saver, "PAUSE", 0.0)
        monkeypatch.setattr(Saver, "SHARE", 0.0)

    def test_first(lmeval, lm, corpus):
        lmeval.perplexity(lm, corpus("text:text.txt"), chunk_size=16, tokens=200)

    def test_second(lmeval, lm, corpus):
        lmeval.perplexity(lm, corpus("text:text.txt"), chunk_size=16)
"""


@pytest.fixture
def slow(project, monkeypatch):
    project.makefile(".txt", text="It was a dark and stormy night; the rain fell in torrents.\n" * 10)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--lmeval-budget=1000")
    project.makepyfile(slow=SLOW, test_slow=TESTS)
    return project


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Projects after a run, made once for all tests."""
    return tmp_path_factory.mktemp("runs")


def once(slow, folder, make):
    """The project in the state after `make`, which the first test that needs it calls."""
    if not folder.exists():
        make()
        shutil.copytree(slow.path, folder)
    shutil.copytree(folder, slow.path, dirs_exist_ok=True)


@pytest.fixture
def undisturbed(slow, folders):
    """(numbers, steps) of a run that is not interrupted."""
    once(slow, folders / "whole", lambda: passing(slow))
    found = numbers(slow), steps(slow)
    shutil.rmtree(slow.path / ".lmeval")
    return found


def numbers(slow):
    return {
        record["test"]: (
            {name: metric for name, metric in record["metrics"].items() if name != "tokens_per_second"},
            {name: series for name, series in record["series"].items() if name != "chunk_seconds"},
        )
        for record in metrics(slow)["records"]
    }


def steps(slow):
    """The number of steps since the last call."""
    path = slow.path / "steps"
    count = len(path.read_text())
    path.unlink()
    return count


def passing(slow, *options, **outcomes):
    result = run(slow, *options, lm="slow:Slow")
    result.assert_outcomes(passed=2, **outcomes)
    return result


def interrupt(slow, folders, number):
    """The project after a run that this signal ended in its second test, after a checkpoint was saved."""

    def stopped():
        (slow.path / "signal").write_text(str(int(number)))
        result = run(slow, lm="slow:Slow")
        assert not (slow.path / "signal").exists()
        if number == signal.SIGINT:
            assert result.ret == pytest.ExitCode.INTERRUPTED
            assert "KeyboardInterrupt" in result.stdout.str()

    once(slow, folders / number.name, stopped)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=thorough)])
def test_a_stopped_run_is_resumed_with_the_same_final_numbers(undisturbed, slow, folders, number):
    interrupt(slow, folders, number)
    before = steps(slow)
    passing(slow).stdout.fnmatch_lines(
        [
            "slow:Slow on text:text.txt?test?: result taken from an interrupted run",
            "slow:Slow on text:text.txt?test?: resumed at token * of an interrupted run",
        ]
    )
    assert numbers(slow) == undisturbed[0]
    assert max(before, steps(slow)) < undisturbed[1]


def test_a_run_stopped_by_ctrl_c_reports_what_it_finished(slow, folders):
    interrupt(slow, folders, signal.SIGINT)
    assert [record["test"] for record in metrics(slow)["records"]] == ["test_slow.py::test_first"]


@thorough
def test_a_run_after_a_finished_one_measures_again(undisturbed, slow, folders):
    once(slow, folders / "whole", lambda: None)
    steps(slow)
    assert "interrupted run" not in passing(slow).stdout.str()
    assert steps(slow) == undisturbed[1]


@thorough
@pytest.mark.parametrize(("options", "seed"), [(["--lmeval-fresh"], 0), ([], 10)], ids=["fresh", "another model"])
def test_a_run_that_is_fresh_or_of_another_model_does_not_resume(slow, folders, options, seed):
    interrupt(slow, folders, signal.SIGKILL)
    code = (slow.path / "tiny.py").read_text()
    (slow.path / "tiny.py").write_text(code.replace("manual_seed(0)", f"manual_seed({seed})"))
    assert "interrupted run" not in passing(slow, *options).stdout.str()


@thorough
def test_a_broken_last_line_of_the_journal_is_dropped_with_a_warning(slow, folders):
    interrupt(slow, folders, signal.SIGKILL)
    journal = slow.path / ".lmeval/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    result = passing(slow, warnings=1)  # in a project whose other warnings are errors
    result.stdout.fnmatch_lines(["*JournalWarning: *journal.jsonl, line 1 is broken and was dropped*"])


def test_the_numbers_do_not_depend_on_the_order_of_tests_and_a_pipe_gets_no_progress(undisturbed, slow):
    result = passing(slow, "test_slow.py::test_second", "test_slow.py::test_first")
    assert numbers(slow) == undisturbed[0]
    output = result.stdout.str() + result.stderr.str()
    assert [part in output for part in ("perplexity", " left", "\r")] == [True, False, False]


@pytest.mark.parametrize("columns", [80, 140])
def test_progress_is_shown_on_a_terminal_through_the_capture_and_fits_into_a_line(slow, columns):
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--lm", "slow:Slow", "-k", "first"]
    environment = {**os.environ, "TERM": "xterm", "PAUSE": "0.05"}  # a bar is shown after 0.2 s
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(command, cwd=slow.path, stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    output = b""
    while select.select([main], [], [], 600)[0]:
        try:
            output += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    os.close(main)
    assert process.wait(timeout=600) == 0, output
    shown = [line for line in output.decode().split("\r") if line.startswith("slow:Slow reads text:text.txt[test]:")]
    assert any("perplexity " in line and line.rstrip().endswith(" left") for line in shown)
    assert any("tokens/s" in line for line in shown) == (columns > 100)
    assert max(map(len, shown)) < columns
