"""Build the plots: the curves of all records by what they show, each with a caption in words.

A figure is plain data that the page's script reads (`templates/figures.js`):

    {"title", "kind": "line" | "spread" | "dots" | "scatter", "choices": [{"label", "caption", "x", "y",
     "log": "" | "x" | "y" | "xy", "curves": [{"name", "x": [...], "y": [...], "low", "high"}]}]}

A choice is one text, task or shape; the reader picks one of several.

Observable Plot and d3 draw them (`vendor/`, 490 kB, inlined only in pages with figures): the only well-kept library found that
makes SVG in the browser, which prints sharply, follows the page's colours and can be read aloud, without a build or a network.
uPlot and Chart.js are smaller but paint a canvas; Vega and Plotly weigh several times as much, and the page's
Content-Security-Policy forbids Vega's code from strings; Python's libraries draw for one width and theme or need Matplotlib.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pytest_lmeval.records._history import Line
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import headline_of, metric
from pytest_lmeval.report._words import number

Choices = dict[str, dict[str, Any]]

LOG_RATIO = 30  # ratio of the largest to the smallest value above which an axis is logarithmic
CAPTIONED = 6  # curves that a caption describes one by one


def figures(records: Sequence[Record], history: Sequence[Line] = ()) -> list[dict[str, Any]]:
    """The figures of a document, in the order of its records."""
    drawn: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, series in record.series.items():
            if series.x:
                title = series.title or name.replace("_", " ").capitalize()
                ordered = "spread" if series.x_unit == "run" else "line"  # runs have no order that matters
                kind = "scatter" if series.points else ordered
                figure = drawn.setdefault(title, {"title": title, "kind": kind, "choices": {}})
                label = ": ".join(filter(None, (record.subject, series.part)))
                choice = _choice(figure["choices"], label, series.x_unit, series.y_unit, series.log)
                curve = _curve(record, series.x, series.y, series.curve)
                choice["curves"].append(curve | ({"low": series.low, "high": series.high} if series.low else {}))
    found = [*drawn.values(), *filter(None, (quality_by_bytes(records), over_runs(history)))]
    for figure in found:
        figure["choices"] = list(figure["choices"].values())
        for choice in figure["choices"]:
            _disambiguate(choice["curves"])
            if figure["kind"] == "dots" and _needs_log(choice["curves"], "x"):
                choice["log"] = "x"
            if "y" not in choice["log"] and figure["kind"] in ("line", "dots") and _needs_log(choice["curves"], "y"):
                choice["log"] += "y"
            choice["caption"] = caption(choice, figure["kind"])
    return found


def _needs_log(curves: list[dict[str, Any]], axis: str) -> bool:
    """A linear axis would flatten the small values."""
    bounds = [value for curve in curves for value in curve.get("low", ()) if value is not None] if axis == "y" else []
    values = [*bounds, *(value for curve in curves for value in curve[axis])]
    return bool(min(values) > 0 and max(values) > LOG_RATIO * min(values))


def _choice(choices: Choices, label: str, x: str, y: str, log: str = "") -> dict[str, Any]:
    """The choice of this label; another one for another unit."""
    if choices.get(label, {"y": y})["y"] != y:
        label = f"{label}, {y}"
    return choices.setdefault(label, {"label": label, "x": x, "y": y, "log": log, "curves": []})


def _curve(record: Record, x: list[float], y: list[float], name: str = "") -> dict[str, Any]:
    return {"name": ", ".join(filter(None, (record.lm.spec, name))), "note": _short(record.test), "x": x, "y": y}


def quality_by_bytes(records: Sequence[Record]) -> dict[str, Any] | None:
    """Quality against the bytes of the weights, for subjects measured on models of several sizes or precisions."""
    choices: Choices = {}
    for record in records:
        name = headline_of(record.metrics)
        if name is None or not record.lm.bytes or record.is_verdict:
            continue
        value, label = record.metrics[name], metric(name, record.metrics[name]).label
        choice = _choice(choices, f"{record.subject}: {label}", "bytes of the weights", value.unit or label)
        bounds = {end: [bound] for end, bound in zip(("low", "high"), value.interval or (), strict=False)}
        choice["curves"].append(_curve(record, [record.lm.bytes], [float(value)]) | bounds)
    shown = {label: choice for label, choice in choices.items() if len({curve["x"][0] for curve in choice["curves"]}) > 1}
    return {"title": "Quality by bytes of the weights", "kind": "dots", "choices": shown} if shown else None


def over_runs(history: Sequence[Line]) -> dict[str, Any] | None:
    """The lines of `history.jsonl` as curves over time: a choice for each metric of each subject that two runs measured."""
    choices: Choices = {}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in sorted(history, key=lambda line: line.started):
        label = ": ".join(filter(None, (line.subject, metric(line.metric).label)))
        point = {"x": line.started.isoformat(), "y": line.value, "low": line.low, "high": line.high}
        point["runs"] = line.commit or line.run
        identity = (label, line.unit, line.lm, _short(line.test))
        if identity not in found:
            found[identity] = {"name": line.lm, "note": _short(line.test), **{field: [] for field in point}}
            _choice(choices, label, "time", line.unit)["curves"].append(found[identity])
        for field, value in point.items():
            found[identity][field].append(value)
    shown = {label: choice for label, choice in choices.items() if any(len(curve["x"]) > 1 for curve in choice["curves"])}
    return {"title": "History over runs", "kind": "line", "time": True, "choices": shown} if shown else None


def caption(choice: dict[str, Any], kind: str) -> str:
    """Describe the curves in words."""
    sentences = [f"{curve['name']} {_describe(choice, curve, kind)}" for curve in choice["curves"][:CAPTIONED]]
    if (left := len(choice["curves"]) - CAPTIONED) > 0:
        sentences.append(f"and {left} more")
    return "; ".join(sentences) + "."


def _describe(choice: dict[str, Any], curve: dict[str, Any], kind: str) -> str:
    x, y = curve["x"], curve["y"]
    if kind == "spread":
        ordered = sorted(y)
        middle, spread = ordered[len(ordered) // 2], f"{number(ordered[0])} to {number(ordered[-1])}"
        return f"takes {number(middle, choice['y'])} in the median of {len(y)} runs, {spread}"
    if kind == "scatter":
        middle, other = (number(statistics.median(values)) for values in (x, y))
        return f"has {len(y)} points around {middle}, {other} (medians)"
    if len(y) == 1:
        return f"{number(y[0], choice['y'])} at {_at(x[0], choice['x'])}"
    ends = f"{_at(x[0], '%' if choice['x'] == '%' else '')} to {_at(x[-1], choice['x'])}"
    first, last = number(y[0], choice["y"]), number(y[-1], choice["y"])
    if first == last:
        return f"is {last} at both ends of {ends}"
    verb, over = "falls" if y[-1] < y[0] else "rises", "from" if choice["x"] == "time" else "over"
    return f"{verb} from {first} to {last}, {over} {ends}"


def _at(x: Any, unit: str) -> str:
    if isinstance(x, str):  # a time
        return x[:16].replace("T", " ")
    if unit.startswith("bytes"):
        return number(x, "bytes")
    if unit == "%" or x == int(x):
        return number(x, unit)
    return f"about {number(max(1, round(x)), unit)}"  # the middle of several positions


def _disambiguate(curves: list[dict[str, Any]]) -> None:
    """Add the test to names that several curves have, then a number to those that are still the same."""
    suffixes: Iterable[Sequence[Any]] = ([curve.pop("note") for curve in curves], range(1, len(curves) + 1))
    for own in suffixes:
        counts = Counter(curve["name"] for curve in curves)
        for curve, suffix in zip(curves, own, strict=True):
            if counts[curve["name"]] > 1 and suffix:
                curve["name"] += f" ({suffix})"


def _short(test: str) -> str:
    return test.rpartition("::")[2]
