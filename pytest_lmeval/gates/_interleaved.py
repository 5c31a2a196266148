"""Two versions of a project, run in turns in fresh processes: A B B A A B B A, so that what drifts falls on both alike.

A side is a git revision (checked out beside the project, and put before everything on the module search path), or another
Python (an executable, or the folder of a virtual environment), or the project as it stands.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pytest_lmeval.errors import DocumentError, SideError
from pytest_lmeval.gates._margins import parse
from pytest_lmeval.records._document import NAME, RunDocument, load
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import metric

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
            written = Path(output) / NAME
            if not written.exists():
                last = "\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-LAST_LINES:])
                raise SideError(
                    f"{self.name} measured nothing: `{' '.join(command[1:])}` in {self.folder} ended with status "
                    f"{done.returncode}.\n{last}"
                )
            try:
                document = load(written)
            except DocumentError as error:
                raise SideError(
                    f"{self.name} measured something, and wrote it so that this version cannot read it. {error} Compare with a "
                    f"revision or an environment whose pytest-lmeval writes the same {NAME} as this one."
                ) from error
            self.runs.append(numbers(document))
            self.failed |= {failure.test for failure in document.failures}

    def _environment(self) -> dict[str, str]:
        """This process's, with the side's own code before all other."""
        own = [str(path) for path in (self.folder, self.folder / "src") if path.is_dir()]
        inherited = {name: value for name, value in os.environ.items() if name not in OF_PYTEST}
        return {**inherited, "PYTHONPATH": os.pathsep.join([*own, *filter(None, [inherited.get("PYTHONPATH")])])}


def numbers(document: RunDocument) -> dict[Key, Number]:
    """The speeds of a run. Of a test that measured the same thing twice, the first."""
    found: dict[Key, Number] = {}
    for record in document.records:
        for name, value in record.metrics.items():
            if metric(name, value).compared:
                key = Key(record.test, record.lm.spec, record.subject, name)
                found.setdefault(key, Number(float(value), value.unit, bool(value.higher_is_better), threshold(record, name)))
    return found


def threshold(record: Record, name: str) -> float | None:
    """What a speed may lose by the marker `lmeval_gate` of the test, as a share; None if that does not name it."""
    row = (record.gate or {}).get(name)
    if row is None or row.verdict != "not judged":
        return None
    value = record.metrics[name]
    return parse(row.margin).of(value) / value


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
