"""Two versions of a project, run in turns in fresh processes: A B B A A B B A, so that what drifts falls on both alike.

A side is a git revision (checked out beside the project, and put before everything on the module search path), or another
Python (an executable, or the folder of a virtual environment), or the project as it stands.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import SideError
from pytest_lmeval.gates.margins import NOT_JUDGED, SPEED_NAMES

SPEED = {  # kind of record -> metrics that are compared: medians, since a percentile of one run says little
    "latency": ("prefill", "ttft", "itl", "e2e"),
    "throughput": ("tokens_per_second", "decode_tokens_per_second"),
    "streaming": ("chunk_latency", "tokens_per_second"),
}
OF_PYTEST = ("PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_VERSION")
LAST_LINES = 15


@dataclass(frozen=True)
class Key:
    """What a number is about, on both sides."""

    test: str
    lm: str
    subject: str
    metric: str


@dataclass(frozen=True)
class Number:
    """A metric of one run. `threshold` is the share that it may lose by the test's marker, None where that names none."""

    value: float
    unit: str
    higher_is_better: bool
    threshold: float | None = None


@dataclass
class Side:
    """Where a version lies, and what it was measured to do: `runs`, one after the other.

    markers  whether the markers of its tests are read: by comparing with a baseline that is not there
    failed   its tests that failed in any run; what they measured until then counts
    """

    name: str
    folder: Path
    python: str = sys.executable
    markers: bool = False
    runs: list[dict[Key, Number]] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)

    def run(self, arguments: list[str]) -> None:
        """Run pytest once. Raises SideError where it leaves no numbers."""
        with tempfile.TemporaryDirectory(prefix="lmeval-") as output:
            own = [f"--lmeval-dir={output}", *([f"--lmeval-baseline={output}/none.json"] if self.markers else [])]
            command = [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *own, *arguments]
            done = subprocess.run(
                command, cwd=self.folder, env=self._environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            written = Path(output) / "metrics.json"
            if not written.exists():
                last = "\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-LAST_LINES:])
                raise SideError(
                    f"{self.name} measured nothing: `{' '.join(command[1:])}` in {self.folder} ended with status "
                    f"{done.returncode}.\n{last}"
                )
            document = json.loads(written.read_text(encoding="utf-8"))
            self.runs.append(numbers(document))
            self.failed |= {failure["test"] for failure in document.get("failures", [])}

    def _environment(self) -> dict[str, str]:
        """This process's, with the side's own code before all other."""
        own = [str(path) for path in (self.folder, self.folder / "src") if path.is_dir()]
        inherited = {name: value for name, value in os.environ.items() if name not in OF_PYTEST}
        return {**inherited, "PYTHONPATH": os.pathsep.join([*own, *filter(None, [inherited.get("PYTHONPATH")])])}


def numbers(document: dict[str, Any]) -> dict[Key, Number]:
    """The speeds in a metrics.json. Of a test that measured the same thing twice, the first."""
    found: dict[Key, Number] = {}
    for record in document["records"]:
        for name in SPEED.get(record["kind"], ()):
            if (metric := record["metrics"].get(name)) is not None:
                key = Key(record["test"], str(record["lm"]["spec"]), record["subject"], name)
                better, allowed = bool(metric["higher_is_better"]), thresholds(record)
                found.setdefault(key, Number(metric["value"], metric["unit"], better, allowed.get(name)))
    return found


def thresholds(record: dict[str, Any]) -> dict[str, float]:
    """What speeds may lose by the marker `lmeval_gate` of the test, as shares."""
    found: dict[str, float] = {}
    for named, row in (record.get("gate") or {}).items():
        if row["verdict"] == NOT_JUDGED:
            size = float(row["margin"].rstrip(" %"))
            share = size / 100 if row["margin"].endswith("%") else size / row["new"]
            found |= dict.fromkeys((named, *SPEED_NAMES.get(named, ())), share)
    return found


@contextlib.contextmanager
def side(named: str, folder: Path) -> Iterator[Side]:
    """The side that a revision or an environment names, while it is needed. Raises SideError where it names neither."""
    python = _python(named)
    if python is not None:
        yield Side(named, folder, python)
        return
    _git(folder, "rev-parse", "--verify", f"{named}^{{commit}}", named=named)
    root = Path(_git(folder, "rev-parse", "--show-toplevel", named=named))
    with tempfile.TemporaryDirectory(prefix="lmeval-base-") as place:
        checkout = Path(place) / root.name
        _git(root, "worktree", "add", "--quiet", "--detach", str(checkout), named, named=named)
        try:
            yield Side(named, checkout / folder.resolve().relative_to(root.resolve()))
        finally:
            _git(root, "worktree", "remove", "--force", str(checkout), named=named)


def _python(named: str) -> str | None:
    path = Path(named).expanduser()
    inside = [path / "bin" / "python", path / "Scripts" / "python.exe"]
    found = next((place for place in [path, *inside] if place.is_file() and os.access(place, os.X_OK)), None)
    return None if found is None else str(found.absolute())


def _git(folder: Path, *arguments: str, named: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, text=True, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or "git cannot be run").strip().splitlines()[0]
        raise SideError(
            f"{named} is no Python environment and no git revision of {folder} ({said}). Give one of them: --base main, "
            "--base HEAD~1, --base path/to/venv."
        ) from None
    return done.stdout.strip()
