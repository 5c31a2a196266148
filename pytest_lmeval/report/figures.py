"""What is drawn: the curves of all records, by what they show, with the words that say what is seen.

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

import math
from collections.abc import Iterable
from typing import Any

from pytest_lmeval.report.words import number

Choices = dict[str, dict[str, Any]]

SERIES = {  # name of a series -> title, and which axis is logarithmic
    "loss_by_position": ("Loss by position", "x"),
    "running_perplexity": ("Running perplexity", ""),
    "state_bytes": ("State over the stream", ""),
    "prefill_quantiles": ("Time of prefill, by quantile", ""),
    "ttft_quantiles": ("Time to the first token (TTFT), by quantile", ""),
    "itl_quantiles": ("Time between tokens (ITL), by quantile", ""),
    "e2e_by_run": ("Time of a whole request, run by run", ""),
    "chunk_latency": ("Latency of a chunk over the stream", ""),
    "batch_scaling": ("Throughput by batch size", "x"),
    "decode_batch_scaling": ("Throughput of decoding by batch size", "x"),
    "learning_curve": ("Learning curves", ""),
    "held_out_loss": ("Held-out loss", ""),
}
BY_RUN = "_by_run"
QUALITY = ("bits_per_byte", "perplexity", "accuracy", "exact_match", "f1", "rate")
DECADES = 30  # largest over smallest value, from which on an axis is logarithmic
OVERFLOW = 700.0  # nats, whose exponential is no float any more: such a loss is drawn as it is
SAID = 6  # curves that a caption describes one by one


def figures(records: list[dict[str, Any]], history: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The figures of a document, those that most readers look for first."""
    drawn: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record["kind"] == "train"):
        for name, series in record["series"].items():
            _add_series(drawn, record, name, series)
    found = [drawn[title] for title in (*(title for title, _ in SERIES.values()), *sorted(drawn)) if title in drawn]
    found = list({figure["title"]: figure for figure in found}.values())
    found += [figure for figure in (quality_by_bytes(records), over_runs(history or [])) if figure]
    for figure in found:
        figure["choices"] = list(figure["choices"].values())
        for choice in figure["choices"]:
            _name_apart(choice["curves"])
            if figure["kind"] == "dots" and _spans_decades(choice["curves"], "x"):
                choice["log"] = "x"
            choice["log"] += "y" if figure["kind"] != "spread" and _spans_decades(choice["curves"]) else ""
            choice["caption"] = caption(choice, figure["kind"])
    return found


def _spans_decades(curves: list[dict[str, Any]], axis: str = "y") -> bool:
    """Whether a linear axis would press what is small to a flat line."""
    bounds = [value for curve in curves for value in curve.get("low", ()) if value is not None] if axis == "y" else []
    values = [*bounds, *(value for curve in curves for value in curve[axis])]
    return bool(min(values) > 0 and max(values) > DECADES * min(values))


def _add_series(drawn: dict[str, dict[str, Any]], record: dict[str, Any], name: str, series: dict[str, Any]) -> None:
    if not series["x"]:
        return
    y, unit = series["y"], series["y_unit"]
    if name == "running_loss" and max(y) < OVERFLOW:
        name, y, unit = "running_perplexity", [math.exp(nats) for nats in y], "perplexity"
    title, log = SERIES.get(name, (_words(name).capitalize(), ""))
    kind = "spread" if name.endswith(BY_RUN) else "line"
    figure = drawn.setdefault(title, {"title": title, "kind": kind, "choices": {}})
    choice = _choice(figure["choices"], record["subject"], series["x_unit"], unit, log)
    choice["curves"].append({"name": record["lm"]["spec"], "note": _short(record["test"]), "x": series["x"], "y": y})


def _choice(choices: Choices, label: str, x: str, y: str, log: str) -> dict[str, Any]:
    """That of this label; what is in another unit is another choice."""
    if choices.get(label, {"y": y})["y"] != y:
        label = f"{label}, {y}"
    return choices.setdefault(label, {"label": label, "x": x, "y": y, "log": log, "curves": []})


def quality_by_bytes(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Quality against the bytes of the weights, where a subject was asked of models of several sizes or precisions."""
    choices: Choices = {}
    for record in records:
        name = next((name for name in QUALITY if name in record["metrics"]), None)
        if name is None or record["kind"] not in ("perplexity", "task") or not record["lm"]["bytes"]:
            continue
        metric, lm = record["metrics"][name], record["lm"]
        choice = _choice(choices, record["subject"], "bytes of the weights", metric["unit"] or _words(name), "")
        point = {bound: [metric[bound]] for bound in ("low", "high") if metric[bound] is not None}
        curve = {"name": lm["spec"], "note": _short(record["test"]), "x": [lm["bytes"]], "y": [metric["value"]]}
        choice["curves"].append(curve | point)
    several = {label: choice for label, choice in choices.items() if len({curve["x"][0] for curve in choice["curves"]}) > 1}
    return {"title": "Quality by bytes of the weights", "kind": "dots", "choices": several} if several else None


def over_runs(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The lines of `history.jsonl` as curves over time: a choice for each metric of each subject that two runs measured."""
    choices: Choices = {}
    for line in sorted(history, key=lambda line: line["started"]):
        label = f"{line['subject']}: {_words(line['metric'])}" if line["subject"] else _words(line["metric"])
        choice = _choice(choices, label, "time", "", "")
        curves = {(curve["name"], curve["note"]): curve for curve in choice["curves"]}
        identity = (line["lm"], _short(line["test"]))
        if identity not in curves:
            curves[identity] = {"name": identity[0], "note": identity[1], "x": [], "y": [], "low": [], "high": [], "runs": []}
            choice["curves"].append(curves[identity])
        for field, value in (("x", line["started"]), ("y", line["value"]), ("runs", line["commit"] or line["run"])):
            curves[identity][field].append(value)
        for bound in ("low", "high"):
            curves[identity][bound].append(line[bound])
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


def _name_apart(curves: Iterable[dict[str, Any]]) -> None:
    """Curves of one name take the test's into theirs, or a number where that is the same too."""
    curves = list(curves)
    for field in ("note", "place"):
        names = [curve["name"] for curve in curves]
        for place, curve in enumerate(curves, start=1):
            if names.count(curve["name"]) > 1 and (more := str(place) if field == "place" else curve["note"]):
                curve["name_new"] = f"{curve['name']} ({more})"
        for curve in curves:
            curve["name"] = curve.pop("name_new", curve["name"])
    for curve in curves:
        curve.pop("note", None)


def _short(test: str) -> str:
    return test.rpartition("::")[2]


def _words(name: str) -> str:
    return name.replace("_", " ")
