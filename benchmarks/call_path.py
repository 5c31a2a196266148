"""Count the functions of this package that one token, one question or one latency sample passes, from its file to the report.

    python benchmarks/call_path.py        functions, files, switches from file to file, and returns to an earlier file: of the
                                          verb's call alone, and of the whole run with its report

Each is a run of pytest with one test on the demo model. The verb is called twice and the second call counted, without imports.
A function counts once, at its first call. The files of these calls, in order, are those that a reader opens: a switch goes to
another file, a return to an earlier one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = {
    "token": "lmeval.perplexity(lm, text, tokens=3000)",
    "question": "lmeval.task(lm, Task('colours', [{'n': n} for n in range(9)], ask))",
    "latency sample": "lmeval.latency(lm, seq_len=64, runs=5, warm_up=1)",
}
TEST = """
from pytest_lmeval import Choices, Task
from pytest_lmeval.data import corpus as find

def ask(row):
    return Choices("The sky is", (" blue", " green"), 0)

def test_it(lm, lmeval):
    import __main__

    text = find("text:text.txt")
    {call}
    __main__.seen.clear()
    begin = len(__main__.log)
    {call}
    __main__.verb[:] = __main__.log[begin:]
"""
RUN = """
import json, sys, pytest

log, verb, seen = [], [], set()

def enter(frame, event, argument):
    code = frame.f_code
    if event == "call" and code not in seen:
        seen.add(code)
        if code.co_flags & 1 and "pytest_lmeval" in code.co_filename and not code.co_name.startswith("<"):
            log.append((code.co_filename.rpartition("pytest_lmeval/")[2], code.co_qualname))

sys.setprofile(enter)
code = pytest.main(["-q", "-p", "no:cacheprovider", "--benchmark-disable-gc", "test_it.py"])
sys.setprofile(None)
print(json.dumps([int(code), verb, list(dict.fromkeys(map(tuple, log)))]))
"""


def paths_of(call: str) -> tuple[list[str], list[str]]:
    """The files of the functions in the order of their first calls: by the verb, and by the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("The sky is blue and the grass is green. " * 200)
        Path(folder, "test_it.py").write_text(TEST.format(call=call))
        for _ in range(2):  # the second run takes the verdict of the first
            command = [sys.executable, "-c", RUN]
            done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=True)
        code, verb, run = json.loads(done.stdout.splitlines()[-1])
        assert code == 0, done.stdout
        return [file for file, _ in verb], [file for file, _ in run]


def figures(files: list[str]) -> str:
    switches = [index for index in range(1, len(files)) if files[index] != files[index - 1]]
    returns = [index for index in switches if files[index] in files[:index]]
    return f"{len(files):4} functions, {len(set(files)):3} files, {len(switches):4} switches, {len(returns):4} returns"


def main() -> None:
    for what, call in TESTS.items():
        for part, files in zip(("verb", "run"), paths_of(call), strict=True):
            print(f"{what:15} {part:5} {figures(files)}")


if __name__ == "__main__":
    main()
