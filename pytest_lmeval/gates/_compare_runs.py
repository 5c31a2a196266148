"""`lmeval compare-runs --base main -- benchmarks/test_speed.py`: is the project slower than it was?

Both versions run the same tests in turns, in fresh processes. After `--pairs` of them one looks, and stops if every verdict is
clear; else once more after `--most`, or when the budget is spent. Where nothing changed, a look calls anything worse in one of
100 comparisons, however many numbers there are; one who looks after every pair would raise many more false alarms.

Exit status 1 where a number got worse or a test of this version failed; what is unclear fails nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from pytest_lmeval.errors import SideError
from pytest_lmeval.gates._interleaved import Key, Number, Side, side
from pytest_lmeval.records._comparison import ORDER
from pytest_lmeval.statistics._ratio import Ratio, Verdict, judge_all, ratio

PAIRS, MOST, BUDGET, THRESHOLD = 6, 12, 900.0, 0.05
LEVEL = 0.01  # of each of the two looks


@dataclass(frozen=True)
class Row:
    """One number on both sides."""

    key: Key
    base: Number
    new: Number
    ratio: Ratio
    verdict: Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="REVISION|ENVIRONMENT", help="git revision, Python, or virtualenv")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help=f"pairs before the first verdict ({PAIRS})")
    parser.add_argument("--most", type=int, default=MOST, metavar="N", help=f"pairs at most ({MOST})")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"no new pair after that ({BUDGET:g})")
    parser.add_argument(
        "--threshold", type=_share, default=THRESHOLD, metavar="SHARE", help="differences up to it do not matter (5%%)"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="write all numbers of all runs there, as JSON")
    parser.add_argument("tests", nargs="*", metavar="-- PYTEST ARGUMENTS", help="what to run: paths, -k, --lm, ...")


def main(arguments: argparse.Namespace) -> int:
    """Run both sides in turns and judge. Returns 0, 1 where a number got worse, 2 where a side cannot be run."""
    if not 2 <= arguments.pairs <= arguments.most:
        print(
            f"--pairs {arguments.pairs} --most {arguments.most}: at least 2 pairs, and at most as many as --most.",
            file=sys.stderr,
        )
        return 2
    if arguments.to and (problem := _unwritable(arguments.to)):
        print(f"--to {arguments.to}: {problem}, so the numbers would be lost. Name another file.", file=sys.stderr)
        return 2
    here = Side("this version", Path.cwd(), markers=True)
    try:
        with side(arguments.base, Path.cwd()) as base:
            race(base, here, arguments)
    except SideError as error:
        print(error, file=sys.stderr)
        return 2
    rows = compared(base, here, arguments.threshold)
    if arguments.to:
        arguments.to.write_text(json.dumps(document(rows, base, here), indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(rows, base, here, arguments.threshold)))
    if not rows:
        print(
            "no speed was measured on both sides: choose tests that use lmeval.latency, throughput or streaming.",
            file=sys.stderr,
        )
        return 2
    return int(bool(here.failed) or any(row.verdict == "worse" for row in rows))


def _unwritable(path: Path) -> str | None:
    try:
        with path.open("a"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def race(base: Side, new: Side, arguments: argparse.Namespace) -> None:
    """Pairs of runs, the order turned round from pair to pair."""
    began = time.monotonic()
    for pair in range(1, arguments.most + 1):
        for runner in (base, new) if pair % 2 else (new, base):
            runner.run(arguments.tests)
        spent = time.monotonic() - began
        print(
            f"pair {pair} of {arguments.pairs if pair <= arguments.pairs else arguments.most}, {spent:.0f} s", file=sys.stderr
        )
        if spent > arguments.budget:
            return
        if pair == arguments.pairs and all(row.verdict != "unclear" for row in compared(base, new, arguments.threshold)):
            return


def compared(base: Side, new: Side, threshold: float) -> list[Row]:
    """Every number that all runs of both sides have, the worst first."""
    keys = _everywhere(base, new)
    pairs = [[[run[key].value for run in one.runs] for one in (base, new)] for key in keys]
    found = [ratio(*pair) for pair in pairs]
    first = [new.runs[0][key] for key in keys]
    better = [number.higher_is_better for number in first]
    verdicts = judge_all(found, [number.threshold or threshold for number in first], better, level=LEVEL)
    rows = []
    for key, number, (before, after), one, verdict in zip(keys, first, pairs, found, verdicts, strict=True):
        old, new_ = (replace(number, value=median(values)) for values in (before, after))
        rows.append(Row(key, old, new_, one, verdict))
    return sorted(rows, key=lambda row: ORDER.index(row.verdict))


def lines(rows: list[Row], base: Side, new: Side, threshold: float) -> list[str]:
    """A table, and what it rests on."""
    table = [["verdict", "test", "metric", base.name, new.name, "ratio", "95 % interval"], *(_cells(row, rows) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left_out = _only(base, new)
    failed = [f"{one.name}: {', '.join(sorted(one.failed))}" for one in (base, new) if one.failed]
    return [
        *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table),
        "",
        f"{len(new.runs)} pairs of runs in fresh processes, in turns; a difference counts from {100 * threshold:g} % on (or "
        "what the marker lmeval_gate of a test says), if chance would bring it about in one of 100 comparisons at most.",
        *([f"tests that failed, {'; '.join(failed)}"] if failed else []),
        *([f"on one side only, or not in every run: {', '.join(left_out)}"] if left_out else []),
    ]


def _cells(row: Row, rows: list[Row]) -> list[str]:
    several = len({other.key.subject for other in rows if other.key.test == row.key.test}) > 1
    name = row.key.test.rpartition("/")[2] + (f", {row.key.subject}" if several else "")
    figures = [f"{number.value:.4g} {number.unit}" for number in (row.base, row.new)]
    interval = "" if row.ratio.low is None else f"{row.ratio.low:.3f} to {row.ratio.high:.3f}"
    return [row.verdict, name, row.key.metric, *figures, f"{row.ratio.value:.3f}", interval]


def document(rows: list[Row], base: Side, new: Side) -> dict[str, object]:
    """All numbers of all runs, to be looked at again."""
    sides = {
        name: {
            "name": one.name,
            "runs": [[{**asdict(key), **asdict(number)} for key, number in run.items()] for run in one.runs],
        }
        for name, one in (("base", base), ("new", new))
    }
    return {**sides, "verdicts": [{**asdict(row.key), **asdict(row.ratio), "verdict": row.verdict} for row in rows]}


def _everywhere(base: Side, new: Side) -> list[Key]:
    """What every run of both sides has measured, in the order of the first."""
    runs = [*base.runs, *new.runs]
    return [key for key in runs[0] if all(key in run for run in runs)] if runs else []


def _only(base: Side, new: Side) -> list[str]:
    everywhere = set(_everywhere(base, new))
    return sorted({f"{key.test} ({key.metric})" for run in (*base.runs, *new.runs) for key in run if key not in everywhere})


def _share(text: str) -> float:
    """5% or 0.05."""
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"takes a share between 0 and 1, such as 5% or 0.05; got {text!r}.")
    return value
