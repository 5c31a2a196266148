"""The plots: the curves of all records by what they show, each with a caption that says in words what is seen.

A figure is plain data, as the page's script reads it (`templates/figures.js`):

    {"title", "kind": "line" | "spread" | "dots", "choices": [{"label", "caption", "x", "y", "log": "" | "x" | "y" | "xy",
     "curves": [{"name", "x": [...], "y": [...], "low", "high"}]}]}

A choice is one text, one task, one shape; where a figure has several, the reader picks one.

Drawn by Observable Plot and d3, as published (`vendor/`): the only well-kept library found that makes SVG in the browser, so
that what is drawn prints sharply, follows the page's colours and can be read out, and that needs neither a build nor a network.
They are 490 kB, inlined in pages that have figures. uPlot is a tenth of that and Chart.js less than half, and both paint a
canvas, which prints as pixels and says nothing to a screen reader. Vega and Plotly weigh several times as much, and Vega makes
code out of strings, which the page's Content-Security-Policy forbids. Python's libraries draw for one width and one theme, or
ask every user for Matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_lmeval.records._history import Line
from pytest_lmeval.records._measured import Record, Series
from pytest_lmeval.records._metric import headline_of, metric
from pytest_lmeval.report._words import number

Choices = dict[str, dict[str, Any]]

DECADES = 30  # largest over smallest value, from which on an axis is logarithmic
SAID = 6  # curves that a caption describes one by one


def figures(records: Sequence[Record], history: Sequence[Line] = ()) -> list[dict[str, Any]]:
    """The figures of a document, in the order of its records."""
    drawn: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, series in record.series.items():
            if series.x:
                _add_series(drawn, record, name, series)
    found = [*drawn.values(), *(figure for figure in (quality_by_bytes(records), over_runs(history)) if figure)]
    for figure in found:
        figure["choices"] = list(figure["choices"].values())
        for choice in figure["choices"]:
            _disambiguate(choice["curves"])
            if figure["kind"] == "dots" and _spans_decades(choice["curves"], "x"):
                choice["log"] = "x"
            if "y" not in choice["log"] and figure["kind"] != "spread" and _spans_decades(choice["curves"], "y"):
                choice["log"] += "y"
            choice["caption"] = caption(choice, figure["kind"])
    return found


def _spans_decades(curves: list[dict[str, Any]], axis: str) -> bool:
    """Whether a linear axis would press what is small to a flat line."""
    bounds = [value for curve in curves for value in curve.get("low", ()) if value is not None] if axis == "y" else []
    values = [*bounds, *(value for curve in curves for value in curve[axis])]
    return bool(min(values) > 0 and max(values) > DECADES * min(values))


def _add_series(drawn: dict[str, dict[str, Any]], record: Record, name: str, series: Series) -> None:
    title = series.title or name.replace("_", " ").capitalize()
    kind = "spread" if series.x_unit == "run" else "line"  # runs have no order that matters
    figure = drawn.setdefault(title, {"title": title, "kind": kind, "choices": {}})
    choice = _choice(figure["choices"], record.subject, series.x_unit, series.y_unit, series.log)
    choice["curves"].append(_curve(record, series.x, series.y))


def _choice(choices: Choices, label: str, x: str, y: str, log: str = "") -> dict[str, Any]:
    """That of this label; what is in another unit is another choice."""
    if choices.get(label, {"y": y})["y"] != y:
        label = f"{label}, {y}"
    return choices.setdefault(label, {"label": label, "x": x, "y": y, "log": log, "curves": []})


def _curve(record: Record, x: list[float], y: list[float]) -> dict[str, Any]:
    return {"name": record.lm.spec, "note": _short(record.test), "x": x, "y": y}


def quality_by_bytes(records: Sequence[Record]) -> dict[str, Any] | None:
    """Quality against the bytes of the weights, where a subject was asked of models of several sizes or precisions."""
    choices: Choices = {}
    for record in records:
        name = headline_of(record.metrics)
        if name is None or not record.lm.bytes or record.is_verdict:
            continue
        value, label = record.metrics[name], metric(name, record.metrics[name]).label
        choice = _choice(choices, f"{record.subject}: {label}", "bytes of the weights", value.unit or label)
        bounds = {end: [bound] for end, bound in (("low", value.low), ("high", value.high)) if bound is not None}
        choice["curves"].append(_curve(record, [record.lm.bytes], [float(value)]) | bounds)
    several = {label: choice for label, choice in choices.items() if len({curve["x"][0] for curve in choice["curves"]}) > 1}
    return {"title": "Quality by bytes of the weights", "kind": "dots", "choices": several} if several else None


def over_runs(history: Sequence[Line]) -> dict[str, Any] | None:
    """The lines of `history.jsonl` as curves over time: a choice for each metric of each subject that two runs measured."""
    choices: Choices = {}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in sorted(history, key=lambda line: line.started):
        label = ": ".join(filter(None, (line.subject, metric(line.metric).label)))
        identity = (label, line.unit, line.lm, _short(line.test))
        if identity not in found:
            lists: dict[str, list[Any]] = {field: [] for field in ("x", "y", "low", "high", "runs")}
            found[identity] = {"name": line.lm, "note": _short(line.test), **lists}
            _choice(choices, label, "time", line.unit)["curves"].append(found[identity])
        point = {"x": line.started.isoformat(), "y": line.value, "low": line.low, "high": line.high}
        for field, value in {**point, "runs": line.commit or line.run}.items():
            found[identity][field].append(value)
    several = {label: choice for label, choice in choices.items() if any(len(curve["x"]) > 1 for curve in choice["curves"])}
    return {"title": "History over runs", "kind": "line", "time": True, "choices": several} if several else None


def caption(choice: dict[str, Any], kind: str) -> str:
    """What is seen, in words: for those who cannot see it, and as a check of those who can."""
    said = [f"{curve['name']} {_seen(choice, curve, kind)}" for curve in choice["curves"][:SAID]]
    if (left := len(choice["curves"]) - SAID) > 0:
        said.append(f"and {left} more")
    return "; ".join(said) + "."


def _seen(choice: dict[str, Any], curve: dict[str, Any], kind: str) -> str:
    x, y = curve["x"], curve["y"]
    if kind == "spread":
        ordered = sorted(y)
        middle = ordered[len(ordered) // 2]
        around = f"{number(ordered[0])} to {number(ordered[-1])}"
        return f"takes {number(middle, choice['y'])} in the median of {len(y)} runs, {around}"
    if len(y) == 1:
        return f"{number(y[0], choice['y'])} at {_at(x[0], choice['x'])}"
    ends = f"{_at(x[0], '%' if choice['x'] == '%' else '')} to {_at(x[-1], choice['x'])}"
    first, last = number(y[0], choice["y"]), number(y[-1], choice["y"])
    if first == last:
        return f"is {last} at both ends of {ends}"
    return (
        f"{'falls' if y[-1] < y[0] else 'rises'} from {first} to {last}, {'from' if choice['x'] == 'time' else 'over'} {ends}"
    )


def _at(x: Any, unit: str) -> str:
    if isinstance(x, str):  # a time
        return x[:16].replace("T", " ")
    if unit.startswith("bytes"):
        return number(x, "bytes")
    if unit == "%":
        return number(x, unit)
    return number(x, unit) if x == int(x) else f"about {number(max(1, round(x)), unit)}"  # the middle of several positions


def _disambiguate(curves: list[dict[str, Any]]) -> None:
    """Add the name of its test to a curve whose name others have too, or a number where that is the same too."""
    for _ in ("by test", "by number"):
        names = [curve["name"] for curve in curves]
        for index, curve in enumerate(curves, start=1):
            if names.count(curve["name"]) > 1 and (more := curve.pop("note", str(index))):
                curve["new_name"] = f"{curve['name']} ({more})"
        for curve in curves:
            curve["name"] = curve.pop("new_name", curve["name"])
    for curve in curves:
        curve.pop("note", None)


def _short(test: str) -> str:
    return test.rpartition("::")[2]
