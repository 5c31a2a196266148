"""Write verdicts in words: why a test failed, and the table at the end of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from pytest_lmeval.records._comparison import ORDER, Comparison
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.report._changes import comparison_notes
from pytest_lmeval.report._words import number, one_line, several, wrapped

FIRST = 5  # number of examples that the failure of a test names
QUIET = ("same", "identical", "new", "better")  # the table adds notes to these only if the comparison was unusual
JUDGED: dict[float, str] = {1: "right", 0: "wrong"}


def failure(test: str, rows: Sequence[tuple[Record, str, Comparison]], *, baseline: str, accept: str) -> str:
    """Why the test failed.

    rows      record, name, comparison of every metric that got worse
    baseline  the file, as the user named it
    accept    arguments of the command that accepts the new numbers
    """
    numbers = ", ".join(f"{name} {_values(name, row)}" for _, name, row in rows)
    lines = [f"{numbers}: worse than {baseline} allows"]
    for record, name, row in rows:
        lines += ["", f"{name} of {record.lm.spec} on {record.subject}"]
        lines += [f"  {line}" for line in _details(name, row, "question" if row.answers else record.example)]
    first = rows[0][1]
    margin = '"off"' if first == "verdict" else "..."
    lines += [
        "",
        "If the new numbers are meant, accept them after this run, and commit what changes:",
        f"  lmeval baseline accept {accept} -k {shlex.quote(test)}",
        f"If more may be lost here, say so on the test: @pytest.mark.lmeval_gate({first}={margin})",
    ]
    return "\n".join(map(one_line, lines))


def _details(name: str, row: Comparison, example: str) -> Iterator[str]:
    if isinstance(row.base, float | int) and isinstance(row.new, float | int):
        yield from _changed(name, row, row.base, row.new)
    else:
        yield f"was {row.base}, is {row.new}: the model keeps fewer laws of streaming than before."
    if row.p is not None and row.level is not None:
        of = several(row.n or 0, example) + (f" in {row.units:,} groups" if row.units != row.n else "")
        yield f"Had nothing changed, chance would make so large a loss in {_odds(row.p)}; a loss that is larger"
        yield f"than allowed, and rarer than one of {1 / row.level:,.0f}, is called worse ({row.test}, {of})"
    if row.lost is not None and row.won is not None:
        yield from _flipped(name, row, row.lost, row.won, example)
    yield from comparison_notes(row, example)
    if row.differences:
        yield _differing(row.differences)


def _changed(name: str, row: Comparison, base: float, new: float) -> Iterator[str]:
    change = new - base if row.difference is None else row.difference
    percent = f" ({100 * change / base:+.2g} %)" if base else ""
    between = ""
    if row.low is not None and row.high is not None:
        between = f", and with 95 % confidence between {number(row.low)} and {number(row.high)}"
    size = f"{_figure(name, abs(change))} {'higher' if change > 0 else 'lower'}"
    yield f"was {_figure(name, base)}, is {_figure(name, new)}: {size}{percent}{between}"
    word, by = "lower" if row.higher_is_better else "higher", "by the test's marker" if row.margin_given else "by default"
    yield f"allowed are {_figure(name, row.margin)} {word} ({by})"
    if row.test == "exact":
        yield "Every run of the same code repeats it, so the code or its libraries changed."


def _flipped(name: str, row: Comparison, lost: int, won: int, example: str) -> Iterator[str]:
    yield f"{several(lost, example)} lost, {won:,} won" + (":" if row.flipped else "")
    for flip in row.flipped[:FIRST]:
        said = "" if flip.output is None else f", says {flip.output!r}"
        said += "" if flip.target is None else f", right is {flip.target!r}"
        judges = metric(name).judges
        before, after = (JUDGED.get(side, number(side)) if judges else number(side) for side in (flip.before, flip.after))
        yield f"  {flip.id}: {before} -> {after}{said}"
    if lost + won > FIRST:
        yield f"  ... and {lost + won - FIRST:,} more; the first {len(row.flipped)} are in metrics.json"


def _differing(differences: Sequence[str]) -> str:
    return f"the two runs differ: {', '.join(differences)}"


def table(records: Sequence[Record], *, width: int) -> list[str]:
    """A heading for each test, the one with the worst verdict first, and below it a line for each compared metric."""
    tests: dict[str, list[tuple[str, Comparison, str]]] = {}
    for record in records:
        rows = tests.setdefault(record.test, [])
        rows += [(name, row, record.example) for name, row in (record.gate or {}).items()]
        rows.sort(key=lambda found: ORDER.index(found[1].verdict))
    shown = sorted(tests.items(), key=lambda found: min(ORDER.index(row.verdict) for _, row, _ in found[1]))
    cells = {test: [(row.verdict, name.replace("_", " "), _values(name, row), _bounds(row)) for name, row, _ in rows]
             for test, rows in shown}  # fmt: skip
    widths = [max(len(line[column]) for rows in cells.values() for line in rows) for column in range(4)]
    lines: list[str] = []
    for test, rows in shown:
        lines.append(test.rpartition("/")[2])
        if differences := list(dict.fromkeys(what for _, row, _ in rows for what in row.differences)):
            lines += wrapped(_differing(differences), width, indent=4)
        for line, (_, row, example) in zip(cells[test], rows, strict=True):
            lines.append(_fitted(line, widths, width))
            if row.verdict not in QUIET or row.note or row.only_base or row.only_new:
                lines += [piece for remark in comparison_notes(row, example) for piece in wrapped(remark, width, indent=8)]
    return [line if len(line) <= width else line[: width - 3] + "..." for line in map(one_line, lines)]


def _fitted(cells: Sequence[str], widths: Sequence[int], width: int) -> str:
    """A line of the table; if it is too wide, without the interval, and then without aligned columns."""
    bare = (*cells[:-1], cells[-1].partition(" (")[0])
    padded = [[cell.ljust(size) for cell, size in zip(some, widths, strict=True)] for some in (cells, bare)]
    lines = ["    " + "  ".join(some).rstrip() for some in (*padded, bare)]
    return next((line for line in lines if len(line) <= width), lines[-1])


def _values(name: str, row: Comparison) -> str:
    """Before and after; once if they are equal."""
    texts = dict.fromkeys(_figure(name, side) for side in (row.base, row.new) if side is not None)
    return " -> ".join(texts) + (" -> not measured" if row.verdict == "missing" else "")


def _bounds(row: Comparison) -> str:
    if not row.difference:
        return ""
    between = "" if row.low is None or row.high is None else f" ({number(row.low)} to {number(row.high)})"
    return f"{'+' if row.difference > 0 else ''}{number(row.difference)}{between}"


def _figure(name: str, value: float | str | None) -> str:
    """A number of a metric; with its unit only if that is bytes."""
    if value is None or isinstance(value, str):
        return str(value)
    return number(value, "bytes" if metric(name).unit == "bytes" else "")


def _odds(p: float) -> str:
    """A probability in words, such as "about one of 1,700 comparisons"."""
    once = 1 / p if p else float("inf")
    return f"about one of {number(float(f'{once:.2g}'))} comparisons" if once < 1e12 else "next to no comparison"
