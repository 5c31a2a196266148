"""Run pytest on a model in one process, in shards, or in the ranks of torchrun, and read what each took and found.

    runs = Runs(folder, options)
    whole = runs.one()
    shards = runs.shards(3)

Each run has a folder of its own for its output, with a certificate of the model that was stored before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_lmeval.records._document import load
from pytest_lmeval.records._measured import Record

TESTS = '''
import json, os, time
from pathlib import Path
import pytest

@pytest.fixture(autouse=True)
def timed(request, lmeval, lm):
    """Write the processor time and the wall time of the call of a test, after the model is loaded, as a line of a file."""
    began = time.process_time(), time.time()
    Path(os.environ["TOOK"]).with_name(f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    yield
    took = {"processor": time.process_time() - began[0], "began": began[1], "ended": time.time()}
    with open(os.environ["TOOK"], "a") as file:
        file.write(json.dumps(took) + "\\n")
'''
TIMEOUT = 3600  # seconds: of a hang, not of a busy machine


@dataclass(frozen=True)
class Ran:
    """What a run left: its records by test, its output folder, seconds of the verbs and of whole processes, what it printed.

    verbs, whole  seconds of processor time of all its processes: of the verbs, and with start, model and reports
    wall          seconds from the first process's beginning of a verb to the last one's end
    """

    folder: Path
    verbs: float
    whole: float
    wall: float
    output: str
    status: int

    @property
    def records(self) -> dict[str, Record]:
        return {record.test.partition("::")[2]: record for record in load(self.folder).records}

    def examples(self, test: str) -> list[dict[str, Any]]:
        name = self.records[test].examples
        return [] if name is None else list(map(json.loads, (self.folder / name).read_text(encoding="utf-8").splitlines()))


@dataclass
class Runs:
    """Runs of `tests` in `folder`, with these options of pytest. The first stores the certificate that all others take."""

    folder: Path
    tests: str
    options: Sequence[str] = ()
    number: int = 0
    certified: Path | None = field(default=None)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "test_it.py").write_text(TESTS + self.tests)
        (self.folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nlmeval_profile = dev\n")
        self.certified = self._output()
        ran = self.finished(self.start(self.certified, ["-k", "certificate"]), self.certified)
        assert ran.status == 0, ran.output

    def one(self, folder: Path | None = None, *, extra: Sequence[str] = ()) -> Ran:
        """In one process."""
        folder = folder or self.output()
        return self.finished(self.start(folder, extra), folder)

    def shards(self, count: int, folders: Sequence[Path] = ()) -> Ran:
        """In `count` shards, one after another, merged: what merging takes counts as a part of the whole processes."""
        folders = folders or [self.output() for _ in range(count)]
        commands = [(own, ["--lmeval-shard", f"{index}/{count}"]) for index, own in enumerate(folders, start=1)]
        found = [self.finished(self.start(own, extra), own) for own, extra in commands]
        said = self._output()  # what is printed lies beside the merged folder, which has to be empty
        merging = [sys.executable, "-m", "pytest_lmeval", "merge", *map(str, folders), "--to", str(to := said / "merged")]
        merged = self.finished(self._popen(merging, said), said)
        assert merged.status == 0, merged.output
        ran = [*found, merged]
        sums = {name: sum(getattr(one, name) for one in ran) for name in ("verbs", "whole", "wall")}
        return Ran(to, **sums, output="".join(one.output for one in ran), status=max(one.status for one in found))

    def ranks(self, count: int, folder: Path | None = None, *, extra: Sequence[str] = ()) -> Ran:
        """In `count` ranks."""
        folder = folder or self.output()
        return self.finished(self.start(folder, extra, ranks=count), folder)

    def output(self) -> Path:
        """A new folder for output, with the certificate."""
        to, known = self._output(), self.certified
        assert known is not None
        shutil.copytree(known / "certificates", to / "certificates")
        return to

    def _output(self) -> Path:
        self.number += 1
        return self.folder / f"out-{self.number}"

    def start(self, folder: Path, extra: Sequence[str] = (), *, ranks: int = 0) -> subprocess.Popen[str]:
        own = [
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-q",
            *self.options,
            "--lmeval-dir",
            str(folder),
            "-k",
            "not certificate",
        ]
        command = [sys.executable, *own, *extra]
        if ranks:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            where = ["--master-addr", "127.0.0.1", "--master-port", port, "--nnodes", "1", "--nproc-per-node", str(ranks)]
            command = [sys.executable, "-m", "torch.distributed.run", *where, *own, *extra]
        return self._popen(command, folder)

    def _popen(self, command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        chosen = {"OMP_NUM_THREADS": "1", "TOOK": str(folder / "took.jsonl"), "COLUMNS": "200"}
        with open(folder / "printed", "w") as printed:
            return subprocess.Popen(
                command, cwd=self.folder, stdout=printed, stderr=subprocess.STDOUT, text=True, env=os.environ | chosen,
                start_new_session=True,
            )  # fmt: skip

    @staticmethod
    def has_ended(process: subprocess.Popen[str]) -> bool:
        """Whether a process has ended, whose exit status stays there to be read."""
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def finished(self, process: subprocess.Popen[str], folder: Path) -> Ran:
        """What a process took, with those that it started, and what they left in a folder. It is killed after `TIMEOUT`."""
        deadline = time.monotonic() + TIMEOUT
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        whole = ended[2].ru_utime + ended[2].ru_stime
        took = [json.loads(line) for file in folder.glob("took.jsonl") for line in file.read_text().splitlines()]
        wall = max((one["ended"] for one in took), default=0.0) - min((one["began"] for one in took), default=0.0)
        verbs = sum(one["processor"] for one in took)
        return Ran(folder, verbs, whole, wall, (folder / "printed").read_text(), process.returncode)
