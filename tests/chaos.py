"""Runs of pytest that are killed or lose their disk at a chosen call of the model, and what is left of their records.

with Project(folder) as project:
    expected, calls = project.undisturbed("stream")
    found = project.killed("stream", signal.SIGKILL, [calls // 2])
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

HERE = Path(__file__).parent
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PAGE = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals.\n"

MODEL = '''
import atexit, os, pathlib, signal, torch
from tiny import Tiny

AT, HOW = int(os.environ.get("CHAOS_AT", 0)), os.environ.get("CHAOS_HOW", "")
calls = 0


def call():
    """Count a call of any model of this process; at the chosen one, be killed or fill the disk."""
    global calls
    calls += 1
    if calls == AT and HOW.isdigit():
        if int(HOW) == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
        os.kill(os.getpid(), int(HOW))
    elif calls == AT and HOW:
        with open(HOW, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(256))
            except OSError:
                pass


@atexit.register
def count():
    pathlib.Path("calls").write_text(str(calls))


class Called(Tiny):
    def forward(self, input_ids, state=None):
        call()
        return super().forward(input_ids, state)


class Growing(Called):
    """Keeps what is hidden after each token."""

    def forward(self, input_ids, state=None):
        call()
        hidden, _ = self.cell(self.embed(input_ids), None if state is None else state[None, :, -1].contiguous())
        return self.head(hidden), hidden if state is None else torch.cat([state, hidden], dim=1)


class Another(Called):
    """Other weights."""

    def __init__(self):
        super().__init__()
        self.head.bias.data += 0.1
'''
HEAD = """
import pytest
from pytest_lmeval import Choices, Generate, Task
from pytest_lmeval.records._journal import Saver

@pytest.fixture(autouse=True)
def save_every_chunk(monkeypatch):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    monkeypatch.setattr(Saver, "SHARE", 0.0)

ROWS = [{"n": n, "text": "x" * (n * 7 % 13)} for n in range(48)]

def ask(row):
    return Choices(f"The number {row['n']} {row['text']} is", (" even", " odd", " something else"), row["n"] % 2)

def say(row):
    return Generate(f"{row['text']} {row['n']} is", ("x",), max_tokens=6)
"""
KINDS = {
    "stream": 'lmeval.perplexity(lm, corpus("text:text.txt"), chunk_size=16)',
    "documents": 'lmeval.perplexity(lm, corpus("jsonl:texts.jsonl#text"), chunk_size=16, as_stream=False)',
    "losses": 'lmeval.perplexity(lm, corpus("text:text.txt"), chunk_size=32, losses=True)',
    "choices, 2 shots": 'lmeval.task(lm, Task("parity", ROWS, ask, shots=ROWS[:9]), shots=2)',
    "generation": 'lmeval.task(lm, Task("generates", ROWS, say, ("exact_match",)))',
    "choices, growing": 'lmeval.task("called:Growing", Task("parity", ROWS, ask, shots=ROWS[:9]), shots=2)',
    "generation, growing": 'lmeval.task("called:Growing", Task("generates", ROWS, say, ("exact_match",)))',
    "agreement": 'lmeval.agreement(lm, "called:Another", corpus("jsonl:texts.jsonl#text"), as_stream=False)',
    "training": 'lmeval.train(lm, "text:text.txt", held_out=corpus("text:other.txt"), steps=40, batch_size=4, seq_len=16, '
    "eval_every=10, eval_tokens=256)",
    "probe": "lmeval.equivalence(lm)",
}
TIMES = {"seconds", "tokens_per_second", "peak_memory", "peak_memory_growth", "audit_seconds", "chunk_seconds", "peak_bytes"}


def timeless(value: Any) -> Any:
    """A record without what differs from run to run: times, and the peak of a process's memory."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


@dataclass
class Project:
    """A folder with a test for each kind of work.

    server          the runs are its forks; None: those of a server of its own
    kills, resumed  runs that were ended by a signal, and runs that took something over from one
    """

    path: Path
    server: ForkServer | None = None
    kills: int = 0
    resumed: int = 0
    _runs: int = 0
    _own: ForkServer = field(default_factory=ForkServer)

    def __enter__(self) -> Project:
        self.path.mkdir(exist_ok=True)
        shutil.copy(HERE / "tiny.py", self.path)
        (self.path / "called.py").write_text(MODEL)
        (self.path / "text.txt").write_text(PAGE * 18)
        (self.path / "other.txt").write_text(PAGE[::-1] * 8)
        lines = [json.dumps({"text": PAGE[part:] * (1 + part % 3)}) for part in range(0, 60, 6)]
        (self.path / "texts.jsonl").write_text("\n".join(lines))
        (self.path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nlmeval_budget = 1000\nlmeval_profile = ci\n")
        for number, line in enumerate(KINDS.values()):
            arguments = "lmeval, lm, corpus" if "corpus(" in line else "lmeval, lm"
            (self.path / f"test_{number}.py").write_text(f"{HEAD}\ndef test_it({arguments}):\n    {line}\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._own.close()

    def undisturbed(self, kind: str) -> tuple[dict[str, Any], int]:
        """What a run of this kind of work leaves, and the number of calls of models in it."""
        folder = f"undisturbed-{list(KINDS).index(kind)}"
        assert self.run(kind, folder) == 0, self.output
        return self.left(folder), int((self.path / "calls").read_text())

    def killed(self, kind: str, number: int, moments: Sequence[int]) -> dict[str, Any]:
        """What runs leave, each of which is killed by this signal at a call, and started again."""
        self._runs += 1
        folder = f"killed-{self._runs}"
        for at in moments:
            status = self.run(kind, folder, at=at, how=str(int(number)))
            if status == 0:  # it was not that many calls to the end
                return self.left(folder)
            assert status == (2 if number == signal.SIGINT else -number), self.output
            self.kills += 1
        assert self.run(kind, folder) == 0, self.output
        found = self.left(folder)
        shutil.rmtree(self.path / folder)
        return found

    def run(self, kind: str, folder: str, *, at: int = 0, how: str = "") -> int:
        """The exit status of a run; what it printed is in `output`."""
        test = f"test_{list(KINDS).index(kind)}.py"
        options = ["-p", "no:cacheprovider", "--lm", "called:Called", "--lmeval-dir", folder, test]
        stdout, stderr = (self.path / name for name in ("stdout", "stderr"))
        with pytest.MonkeyPatch.context() as patch, open(stdout, "w") as out, open(stderr, "w") as err:
            patch.chdir(self.path)
            for name, value in {"CHAOS_AT": str(at), "CHAOS_HOW": how, "COLUMNS": "200"}.items():
                patch.setenv(name, value)
            status = (self.server or self._own).popen(options, out, err).wait()
        self.resumed += "interrupted run" in self.output
        return status

    @property
    def output(self) -> str:
        return "".join((self.path / name).read_text() for name in ("stdout", "stderr"))

    def left(self, folder: str) -> dict[str, Any]:
        """The records of an output folder, and the files of examples and losses, without times."""
        found = self.path / folder
        records = json.loads((found / "metrics.json").read_text())["records"]
        lines = {
            path.name: [timeless(json.loads(line)) for line in path.read_text().splitlines()]
            for path in found.glob("examples/*.jsonl")
        }
        losses = {path.name: path.read_bytes().hex() for path in found.glob("examples/*.npy")}
        return {"records": timeless(records), "examples": lines, "losses": losses}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two documents differ, and how."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = list(dict.fromkeys([*one, *other]))
        return [line for name in names for line in differences(one.get(name), other.get(name), f"{where}.{name}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        parts = enumerate(zip(one, other, strict=True))
        return [line for index, (a, b) in parts for line in differences(a, b, f"{where}[{index}]")]
    return [] if one == other else [f"{where}: {str(one)[:80]} / {str(other)[:80]}"]


@dataclass(frozen=True)
class Left:
    """What a run leaves whose disk was filled: its status, where its results are, their records, and what is wrong."""

    status: int
    where: str
    records: Any
    wrong: list[str]


MOUNT = "mount -t tmpfs -o size=1m,nr_inodes=200 tmpfs out"


def why_no_disk() -> str | None:
    """Why no small file system can be mounted here; None if one can."""
    if shutil.which("unshare") is None:
        return "there is no `unshare`, so no small file system can be mounted"
    command = ["unshare", "-rm", "sh", "-c", f"mkdir out && {MOUNT}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return f"no small file system can be mounted: {done.stderr.strip()}" if done.returncode else None


def full_disk(project: Project, kind: str, at: int) -> Left:
    """A run whose output folder lies on a file system of a megabyte, which is full from this call of the model on."""
    work, elsewhere = project.path, project.path / "elsewhere"
    for folder in (work / "out", elsewhere):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    test = f"test_{list(KINDS).index(kind)}.py"
    pytest_ = f"{sys.executable} -m pytest -p no:cacheprovider --lm called:Called --lmeval-dir out/lmeval {test}"
    script = f"{MOUNT} && {pytest_}; status=$?; cp out/lmeval/metrics.json kept.json; exit $status"
    (work / "kept.json").unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, [str(work), os.environ.get("PYTHONPATH")]))
    chosen = {"CHAOS_AT": str(at), "CHAOS_HOW": "out/filled", "TMPDIR": str(elsewhere), "PYTHONPATH": path, "COLUMNS": "200"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=work, env={**os.environ, **chosen}, capture_output=True, text=True
    )
    others = list(elsewhere.rglob("metrics.json"))
    wrong = [] if " 1 passed" in done.stdout else [f"the test did not pass: {done.stdout[-600:]}{done.stderr[-300:]}"]
    wrong += ["pytest ended with a traceback"] * ("INTERNALERROR" in done.stdout or "Traceback" in done.stderr)
    found = others[0] if others else work / "kept.json"
    if others and str(others[0].parent) not in done.stdout + done.stderr:
        wrong.append("the results are elsewhere, and no line says so")
    if done.returncode not in (0, 1):
        wrong.append(f"status {done.returncode}")
    try:
        records = timeless(json.loads(found.read_text())["records"])
    except (OSError, ValueError) as error:
        return Left(done.returncode, "nowhere", None, [*wrong, f"no results: {error}"])
    return Left(done.returncode, "elsewhere" if others else "in place", records, wrong)
