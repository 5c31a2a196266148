"""`lmeval compare-runs --base main -- benchmarks/test_speed.py`: find out whether the project became slower.

Both versions run the same tests in turns, in fresh processes; each pair of runs gives one log ratio (see docs/statistics.md).
The command judges after `--pairs` of them and stops if every verdict is clear; else it judges once more after `--most`, or when
the budget is spent. Looking after every pair would raise many more false alarms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

from pytest_lmeval.errors import DocumentError, SideError
from pytest_lmeval.gates._margins import parse
from pytest_lmeval.records._comparison import ORDER
from pytest_lmeval.records._document import NAME, RunDocument, load
from pytest_lmeval.records._metric import metric
from pytest_lmeval.report._words import one_line, safe_lines
from pytest_lmeval.statistics._paired import Difference, log_ratio
from pytest_lmeval.statistics._verdict import Name, judge_all

PAIRS, MOST, BUDGET, THRESHOLD = 6, 12, 900.0, 0.05
LEVEL = 0.01  # of each of the two looks
OF_PYTEST = ("PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_VERSION")
LAST_LINES = 15


@dataclass(frozen=True)
class Key:
    """Identifies a number on both sides."""

    test: str
    lm: str
    subject: str
    metric: str


@dataclass(frozen=True)
class Number:
    """A metric of one run. `threshold`: the fraction that it may lose by the test's marker; None if that does not name it."""

    value: float
    unit: str
    higher_is_better: bool
    threshold: float | None = None


@dataclass
class Side:
    """A version of the project: a git revision (checked out beside it), another Python, or the project as it stands.

    markers  whether to read the markers of its tests, by comparing with a baseline that does not exist
    runs     the numbers of its runs so far
    failed   tests that failed in any of them; the numbers that they recorded count
    """

    name: str
    folder: Path
    python: str = sys.executable
    markers: bool = False
    runs: list[dict[Key, Number]] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)

    def run(self, arguments: list[str]) -> None:
        """Run pytest once. Raises SideError if it leaves no numbers."""
        environment = {name: value for name, value in os.environ.items() if name not in OF_PYTEST}
        code = [str(path) for path in (self.folder, self.folder / "src") if path.is_dir()]
        environment["PYTHONPATH"] = os.pathsep.join([*code, *filter(None, [environment.get("PYTHONPATH")])])
        with tempfile.TemporaryDirectory(prefix="lmeval-") as output:
            own = [f"--lmeval-dir={output}", *([f"--lmeval-baseline={output}/none.json"] if self.markers else [])]
            command = [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *own, *arguments]
            done = subprocess.run(
                command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            written = Path(output) / NAME
            if not written.exists():
                last = "\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-LAST_LINES:])
                ran = f"`{' '.join(command[1:])}` in {self.folder} ended with status {done.returncode}"
                raise SideError(f"{self.name} measured nothing: {ran}.\n{last}")
            try:
                document = load(written)
            except DocumentError as error:
                same = f"Compare with a version whose pytest-lmeval writes the same {NAME} as this one."
                raise SideError(f"this version cannot read what {self.name} measured. {error} {same}") from error
            self.runs.append(numbers(document))
            self.failed |= {failure.test for failure in document.failures}


@dataclass(frozen=True)
class Row:
    """One number on both sides. `ratio`: mean of log(new / base), see `log_ratio`."""

    key: Key
    base: Number
    new: Number
    ratio: Difference
    verdict: Name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="REVISION|ENVIRONMENT", help="git revision, Python, or virtualenv")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help=f"pairs before the first verdict ({PAIRS})")
    parser.add_argument("--most", type=int, default=MOST, metavar="N", help=f"pairs at most ({MOST})")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"no new pair after that ({BUDGET:g})")
    parser.add_argument(
        "--threshold", type=_fraction, default=THRESHOLD, metavar="FRACTION", help="smaller differences do not matter (5%%)"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="write all numbers of all runs there, as JSON")
    parser.add_argument("tests", nargs="*", metavar="-- PYTEST ARGUMENTS", help="what to run: paths, -k, --lm, ...")


def main(arguments: argparse.Namespace) -> int:
    """Run both sides in turns and judge. Returns 0, 1 if a number got worse or a test of this version failed, 2 if a side
    cannot be run. Unclear numbers fail nothing."""
    if not 2 <= arguments.pairs <= arguments.most:
        return _refused(f"--pairs {arguments.pairs} --most {arguments.most}: --pairs must be at least 2 and at most --most.")
    try:
        if arguments.to:
            arguments.to.open("a").close()
    except OSError as error:
        return _refused(f"--to {arguments.to}: {error.strerror}, so the numbers would be lost. Name another file.")
    here = Side("this version", Path.cwd(), markers=True)
    try:
        with side(arguments.base, Path.cwd()) as base:
            run_in_turns(base, here, arguments)
    except SideError as error:
        return _refused(str(error))
    rows = compared(base, here, arguments.threshold)
    print("\n".join(map(one_line, lines(rows, base, here, arguments.threshold))))
    try:
        if arguments.to:
            arguments.to.write_text(json.dumps(document(rows, base, here), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        return _refused(
            f"--to {arguments.to} cannot be written ({error.strerror or error}), so only the table above has numbers."
        )
    if not rows:
        return _refused("no speed was measured on both sides: choose tests that use lmeval.latency, throughput or streaming.")
    return int(bool(here.failed) or any(row.verdict == "worse" for row in rows))


def _refused(why: str) -> int:
    print(safe_lines(why), file=sys.stderr)
    return 2


def run_in_turns(base: Side, new: Side, arguments: argparse.Namespace) -> None:
    """Run pairs, in alternating order."""
    began = time.monotonic()
    for pair in range(1, arguments.most + 1):
        for runner in (base, new) if pair % 2 else (new, base):
            runner.run(arguments.tests)
        spent = time.monotonic() - began
        most = arguments.pairs if pair <= arguments.pairs else arguments.most
        print(f"pair {pair} of {most}, {spent:.0f} s", file=sys.stderr)
        if spent > arguments.budget:
            return
        if pair == arguments.pairs and all(row.verdict != "unclear" for row in compared(base, new, arguments.threshold)):
            return


def compared(base: Side, new: Side, threshold: float) -> list[Row]:
    """Every number that all runs of both sides have, the worst first."""
    keys = _everywhere(base, new)
    pairs = [[[run[key].value for run in one.runs] for one in (base, new)] for key in keys]
    ratios = [log_ratio(*pair) for pair in pairs]
    first = [new.runs[0][key] for key in keys]
    margins = [math.log1p(number.threshold or threshold) for number in first]
    verdicts = judge_all(ratios, margins, [number.higher_is_better for number in first], level=LEVEL, two_sided=True)
    rows = []
    for key, number, values, found, verdict in zip(keys, first, pairs, ratios, verdicts, strict=True):
        before, after = (replace(number, value=median(side)) for side in values)
        rows.append(Row(key, before, after, found, verdict.name))
    return sorted(rows, key=lambda row: ORDER.index(row.verdict))


def lines(rows: list[Row], base: Side, new: Side, threshold: float) -> list[str]:
    """A table, and what it rests on."""
    table = [["verdict", "test", "metric", base.name, new.name, "ratio", "95 % interval"], *(_cells(row, rows) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    failed = [f"{one.name}: {', '.join(sorted(one.failed))}" for one in (base, new) if one.failed]
    everywhere = set(_everywhere(base, new))
    elsewhere = {f"{key.test} ({key.metric})" for run in (*base.runs, *new.runs) for key in run if key not in everywhere}
    return [
        *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table),
        "",
        f"{len(new.runs)} pairs of runs in fresh processes, in turns; a difference counts if it exceeds {100 * threshold:g} % "
        "(or the marker lmeval_gate of a test) and chance would make it in one of 100 comparisons at most.",
        *([f"tests that failed, {'; '.join(failed)}"] if failed else []),
        *([f"on one side only, or not in every run: {', '.join(sorted(elsewhere))}"] if elsewhere else []),
    ]


def _cells(row: Row, rows: list[Row]) -> list[str]:
    several = len({other.key.subject for other in rows if other.key.test == row.key.test}) > 1
    name = row.key.test.rpartition("/")[2] + (f", {row.key.subject}" if several else "")
    figures = [f"{number.value:.4g} {number.unit}" for number in (row.base, row.new)]
    low, high = row.ratio.low, row.ratio.high
    interval = "" if low is None or high is None else f"{math.exp(low):.3f} to {math.exp(high):.3f}"
    return [row.verdict, name, row.key.metric, *figures, f"{math.exp(row.ratio.value):.3f}", interval]


def document(rows: list[Row], base: Side, new: Side) -> dict[str, object]:
    """All numbers of all runs, and the verdicts."""
    sides = {}
    for name, one in (("base", base), ("new", new)):
        runs = [[{**asdict(key), **asdict(number)} for key, number in run.items()] for run in one.runs]
        sides[name] = {"name": one.name, "runs": runs}
    verdicts = []
    for row in rows:
        found = row.ratio
        value, low, high = (None if one is None else math.exp(one) for one in (found.value, found.low, found.high))
        judged = {"value": value, "low": low, "high": high, "p_larger": found.p_higher, "p_smaller": found.p_lower}
        verdicts.append({**asdict(row.key), **judged, "n": found.units, "verdict": row.verdict})
    return {**sides, "verdicts": verdicts}


def _everywhere(base: Side, new: Side) -> list[Key]:
    """The numbers that every run of both sides has, in the order of the first."""
    runs = [*base.runs, *new.runs]
    return [key for key in runs[0] if all(key in run for run in runs)] if runs else []


def _fraction(text: str) -> float:
    """5% or 0.05."""
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"takes a fraction between 0 and 1, such as 5% or 0.05; got {text!r}.")
    return value


def numbers(document: RunDocument) -> dict[Key, Number]:
    """The speeds of a run; of a test that measured the same thing twice, the first."""
    found: dict[Key, Number] = {}
    for record in document.records:
        for name, value in record.metrics.items():
            if metric(name, value).compared:
                key = Key(record.test, record.lm.spec, record.subject, name)
                row = (record.gate or {}).get(name)
                threshold = parse(row.margin).of(value) / value if row and row.verdict == "not judged" else None
                found.setdefault(key, Number(float(value), value.unit, bool(value.higher_is_better), threshold))
    return found


@contextlib.contextmanager
def side(named: str, folder: Path) -> Iterator[Side]:
    """The side of a revision or an environment, checked out while it is needed. Raises SideError for any other name."""
    path = Path(named).expanduser()
    pythons = [path, path / "bin" / "python", path / "Scripts" / "python.exe"]
    if python := next((file for file in pythons if file.is_file() and os.access(file, os.X_OK)), None):
        yield Side(named, folder, str(python.absolute()))
        return
    _git(folder, "rev-parse", "--verify", f"{named}^{{commit}}", named=named)
    root = Path(_git(folder, "rev-parse", "--show-toplevel", named=named))
    with tempfile.TemporaryDirectory(prefix="lmeval-base-") as parent:
        checkout = Path(parent) / root.name
        _git(root, "worktree", "add", "--quiet", "--detach", str(checkout), named, named=named)
        try:
            yield Side(named, checkout / folder.resolve().relative_to(root.resolve()))
        finally:
            _git(root, "worktree", "remove", "--force", str(checkout), named=named)


def _git(folder: Path, *arguments: str, named: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, text=True, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or "git cannot be run").strip().splitlines()[0]
        neither = f"{named} is no Python environment and no git revision of {folder} ({said})"
        raise SideError(f"{neither}. Give one of them: --base main, --base HEAD~1, --base path/to/venv.") from None
    return done.stdout.strip()
