"""The verdicts in words: why a test failed, for a reader who knows nothing of gates, and the table at the end of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from pytest_lmeval.report.changes import ORDER
from pytest_lmeval.report.remarks import noun, remarks, several
from pytest_lmeval.report.words import number, wrapped

FIRST = 5  # examples that the failure of a test names
QUIET = ("same", "identical", "new", "better")  # said of these is only what was not compared as one would expect
NAMES = {1: "right", 0: "wrong"}


def failure(test: str, rows: list[tuple[dict[str, Any], str, dict[str, Any]]], *, baseline: str, accept: str) -> str:
    """Why the test failed.

    rows      of every metric that got worse: its record, its name, and its row
    baseline  the file, as it was given
    accept    arguments of the command that accepts the new numbers
    """
    numbers = ", ".join(f"{metric} {_values(metric, row)}" for _, metric, row in rows)
    lines = [f"{numbers}: worse than {baseline} allows"]
    for record, metric, row in rows:
        heading = f"{metric} of {record['lm']['spec']} on {record['subject']}"
        lines += ["", heading, *(f"  {line}" for line in _told(metric, row, noun(record)))]
    command = f"python -m pytest_lmeval baseline accept {accept} -k {shlex.quote(test)}"
    return "\n".join(
        [
            *lines,
            "",
            "If the new numbers are meant, accept them after this run, and commit what changes:",
            f"  {command}",
            "If more may be lost here, say so on the test: " + _marker(rows[0][1]),
        ]
    )


def _told(metric: str, row: dict[str, Any], example: str) -> Iterator[str]:
    if row["test"] == "exact" and "margin" not in row:
        yield f"was {row['base']}, is {row['new']}: the model keeps fewer laws of streaming than it did."
        return
    base, new = _figure(metric, row["base"]), _figure(metric, row["new"])
    yield f"was {base}, is {new}: {_change(metric, row, row['difference'])}{_between(metric, row)}"
    word, by = "lower" if row["higher_is_better"] else "higher", "by the test's marker" if row["margin_given"] else "by default"
    yield f"allowed are {_figure(metric, row['margin'])} {word} ({by})"
    if row["test"] == "exact":
        yield "It is the same in every run of the same code, so this is a change of the code or of its libraries."
    else:
        of = several(row["n"], example) + (f" in {row['units']:,} groups" if row["units"] != row["n"] else "")
        yield f"Had nothing changed, chance would make so large a loss in {_odds(row['p'])}; a loss that is larger"
        yield f"than allowed, and rarer than one of {1 / row['level']:,.0f}, is called worse ({row['test']}, {of})"
    if "flipped" in row:
        yield from _flipped(row, example)
    yield from remarks(row, example)
    if unlike := row.get("unlike"):
        yield f"not had alike: {', '.join(unlike)}"


def _flipped(row: dict[str, Any], example: str) -> Iterator[str]:
    lost, won, listed = row["lost"], row["won"], row["flipped"]
    yield f"{several(lost, example)} lost, {won:,} won" + (":" if listed else "")
    for flip in listed[:FIRST]:
        said = "" if flip["answer"] is None else f", says {flip['answer']!r}"
        said += "" if flip["target"] is None else f", right is {flip['target']!r}"
        before, after = (NAMES.get(flip[name], flip[name]) for name in ("before", "after"))
        yield f"  {flip['id']}: {before} -> {after}{said}"
    if lost + won > FIRST:
        yield f"  ... and {lost + won - FIRST:,} more; the first {len(listed)} are in metrics.json"


def table(records: list[dict[str, Any]], *, width: int) -> list[str]:
    """A heading for each test, the one with the worst verdict first, and under it a line for each metric that was compared."""
    tests: dict[str, list[tuple[str, dict[str, Any], str]]] = {}
    for record in records:
        gate = record.get("gate") or {}
        tests.setdefault(record["test"], []).extend((name, row, noun(record)) for name, row in gate.items())
    for rows in tests.values():
        rows.sort(key=lambda found: _place(found[1]))
    shown = sorted(tests.items(), key=lambda found: min(_place(row) for _, row, _ in found[1]))
    cells = {test: [_cells(name, row) for name, row, _ in rows] for test, rows in shown}
    widths = [max(len(line[column]) for rows in cells.values() for line in rows) for column in range(4)]
    lines: list[str] = []
    for test, rows in shown:
        lines.append(test.rpartition("/")[2])
        if unlike := list(dict.fromkeys(what for _, row, _ in rows for what in row.get("unlike", ()))):
            lines += wrapped(f"not had alike: {', '.join(unlike)}", width, indent=4)
        for line, (_, row, example) in zip(cells[test], rows, strict=True):
            lines.append(_fitted(line, widths, width))
            told = remarks(row, example) if _is_to_be_told(row) else ()
            lines += [piece for remark in told for piece in wrapped(remark, width, indent=8)]
    return [line if len(line) <= width else line[: width - 3] + "..." for line in lines]


def _fitted(cells: tuple[str, ...], widths: list[int], width: int) -> str:
    """A line of the table: where it is too narrow the interval is left out, and then the columns are no longer aligned."""
    bare = (*cells[:-1], cells[-1].partition(" (")[0])
    padded = [[cell.ljust(size) for cell, size in zip(some, widths, strict=True)] for some in (cells, bare)]
    lines = ["    " + "  ".join(some).rstrip() for some in (*padded, bare)]
    return next((line for line in lines if len(line) <= width), lines[-1])


def _cells(metric: str, row: dict[str, Any]) -> tuple[str, ...]:
    return row["verdict"], metric.replace("_", " "), _values(metric, row), _bounds(row)


def _place(row: dict[str, Any]) -> int:
    return ORDER.index(row["verdict"])


def _is_to_be_told(row: dict[str, Any]) -> bool:
    return row["verdict"] not in QUIET or "note" in row or bool(row.get("only_base") or row.get("only_new"))


def _values(metric: str, row: dict[str, Any]) -> str:
    """Before and after; once where they are the same."""
    sides = [row[side] for side in ("base", "new") if row[side] is not None]
    texts = dict.fromkeys(side if isinstance(side, str) else _figure(metric, side) for side in sides)
    return " -> ".join(texts) + (" -> not measured" if row["verdict"] == "missing" else "")


def _bounds(row: dict[str, Any]) -> str:
    if not row.get("difference"):
        return ""
    between = "" if row.get("low") is None else f" ({number(row['low'])} to {number(row['high'])})"
    return f"{'+' if row['difference'] > 0 else ''}{number(row['difference'])}{between}"


def _figure(metric: str, value: float) -> str:
    return number(value, "bytes") if metric.endswith("bytes") else number(value)


def _change(metric: str, row: dict[str, Any], change: float) -> str:
    share = f" ({100 * change / row['base']:+.2g} %)" if row["base"] else ""
    return f"{_figure(metric, abs(change))} {'higher' if change > 0 else 'lower'}{share}"


def _between(metric: str, row: dict[str, Any]) -> str:
    if row.get("low") is None:
        return ""
    return f", and with 95 % confidence between {number(row['low'])} and {number(row['high'])}"


def _odds(p: float) -> str:
    """A probability as people say it.

    >>> _odds(0.0006), _odds(0.4)
    ('about one of 1,700 comparisons', 'about one of 2.5 comparisons')
    """
    once = 1 / p if p else float("inf")
    return f"about one of {number(float(f'{once:.2g}'))} comparisons" if once < 1e12 else "next to no comparison"


def _marker(metric: str) -> str:
    return f'@pytest.mark.lmeval_gate({metric}="off")' if metric == "verdict" else f"@pytest.mark.lmeval_gate({metric}=...)"
