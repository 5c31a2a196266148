"""The rows that every rendering shows: which numbers of a record come first, and how a number reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

HEADLINES = {  # kind -> patterns of the metrics that a summary shows; a report shows all of them
    "perplexity": (
        "perplexity",
        "excess_nats",
        "bits_per_byte",
        "token_accuracy_*",
        "loss_at_*",
        "loss_slope",
        "fast_weight_change",
        "fast_weights_moving",
        "tokens_per_second",
    ),
    "train": ("perplexity", "seconds", "tokens_per_second", "flops_total", "parameters", "model_bytes", "peak_memory_growth"),
    "latency": ("prefill", "ttft", "itl", "e2e"),
    "throughput": ("tokens_per_second",),
    "memory": ("weights_bytes", "state_bytes", "activations_bytes", "peak_bytes"),
    "efficiency": ("*_flops_per_token", "*_intensity", "*_share_of_bound"),
}

PREFIXES = "kMGTPE"
MANY = 12  # models, beyond which they are not described one by one


@dataclass(frozen=True)
class Row:
    """One number of a record, as text."""

    metric: str
    value: str
    interval: str
    n: str


@dataclass(frozen=True)
class Group:
    """A record as it is shown: what it is about, and its numbers."""

    test: str
    lm: str
    subject: str
    verdict: str
    how: str  # where a text was not read in one go: the windows
    outcome: str
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """Several models on one subject: for each metric that they have, a row of each model, in their order.

    records  places of the records that it shows
    """

    kind: str
    subject: str
    models: list[str]
    outcomes: list[str]
    metrics: dict[str, list[Row]]
    records: list[int]


@dataclass(frozen=True)
class Verdict:
    """What was found about one model's laws, as text."""

    lm: str
    verdict: str
    broken: str
    covered: str
    worst_ratio: str
    outcome: str


def verdicts(records: list[dict[str, Any]]) -> list[Verdict]:
    """A line for each model whose laws were asked for; of very many, in order."""
    found = []
    for record in records:
        certificate = record["certificate"]
        if record["kind"] != "equivalence" or not certificate:
            continue
        laws = certificate["laws"]
        cases, longest = sum(law["cases"] for law in laws.values()), certificate.get("longest")
        ratio = certificate["worst_ratio"]
        found.append(
            Verdict(
                record["lm"]["spec"],
                certificate["verdict"],
                ", ".join(name for name, law in laws.items() if not law["kept"]),
                f"{cases:,} cases" + (f", up to {longest:,} tokens" if longest else ""),
                "" if ratio is None else number(ratio),
                record.get("outcome", ""),
            )
        )
    if len(found) > MANY:  # those that are not as one would wish come first
        found.sort(key=lambda row: (row.verdict == "exact-any-chunk", row.lm))
    return found


def model_lines(records: list[dict[str, Any]]) -> list[str]:
    """The models in a line each; of very many, only how many they are."""
    models = {record["lm"]["fingerprint"]: model_line(record["lm"]) for record in records}
    return list(models.values()) if len(models) <= MANY else [f"{len(models)} models"]


def comparisons(records: list[dict[str, Any]]) -> list[Comparison]:
    """What several models have in common: the same verb on the same subject. The first record of each model counts."""
    same: dict[tuple[str, str], dict[tuple[str, str], int]] = {}
    for place, record in enumerate(records):
        if record["kind"] != "equivalence" and record["metrics"]:
            model = (record["lm"]["spec"], record["lm"]["fingerprint"])
            same.setdefault((record["kind"], record["subject"]), {}).setdefault(model, place)
    found = []
    for (kind, subject), by_model in same.items():
        if len(by_model) > 1:
            shown = [records[place] for place in by_model.values()]
            rows = [{row.metric: row for row in (*_rows(record), *_verdict(record))} for record in shown]
            names = dict.fromkeys(name for row in rows for name in row)
            metrics = {name: [row.get(name, Row(name, "", "", "")) for row in rows] for name in names}
            outcomes = [record.get("outcome", "") for record in shown]
            found.append(Comparison(kind, subject, _told_apart(list(by_model)), outcomes, metrics, list(by_model.values())))
    return found


def _told_apart(models: list[tuple[str, str]]) -> list[str]:
    """Names of models (spec, fingerprint): the spec, and the fingerprint where several go by one.

    >>> _told_apart([("a", "01"), ("b", "02"), ("b", "03")])
    ['a', 'b (02)', 'b (03)']
    """
    specs = [spec for spec, _ in models]
    return [spec if specs.count(spec) == 1 else f"{spec} ({fingerprint[:8]})" for spec, fingerprint in models]


def _verdict(record: dict[str, Any]) -> list[Row]:
    certificate = record["certificate"]
    return [Row("verdict", certificate["verdict"], "", "")] if certificate else []


def groups(records: list[dict[str, Any]]) -> list[Group]:
    """The records with the numbers that a summary shows; verdicts have a table of their own."""
    return [
        Group(
            test=record["test"],
            lm=record["lm"]["spec"],
            subject=record["subject"],
            verdict=(record["certificate"] or {}).get("verdict", ""),
            how=_task(record["settings"]) if record["kind"] == "task" else _windows(record["settings"]),
            outcome=record.get("outcome", ""),
            rows=_rows(record),
        )
        for record in records
        if record["kind"] != "equivalence"
    ]


def _windows(settings: dict[str, Any]) -> str:
    if settings.get("reading") != "windows":
        return ""
    how = "as lm_eval reads them" if settings.get("rolling") else f"{settings['overlap']:,} of them read again"
    return f"windows of {settings['window']:,} tokens, {how}"


def _task(settings: dict[str, Any]) -> str:
    """What is not as one would expect of a task's answers."""
    counts = {name: settings.get(name) for name in ("truncated", "moved_borders", "ties", "not_questions", "not_asked")}
    said = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    return ", ".join([settings["reading"]] * (settings["reading"] != "each beginning once") + said)


def _rows(record: dict[str, Any]) -> list[Row]:
    metrics = record["metrics"]
    patterns = HEADLINES.get(record["kind"], ("*",))
    shown = list(dict.fromkeys(name for pattern in patterns for name in metrics if fnmatchcase(name, pattern)))
    if not shown:
        return [Row(record["kind"], "not measured", record["settings"].get("not_measured") or "", "")]
    return [
        Row(
            metric=name.replace("_", " "),
            value=number(metrics[name]["value"], metrics[name]["unit"]),
            interval=interval(metrics[name]),
            n="" if metrics[name]["n"] is None else f"{metrics[name]['n']:,}",
        )
        for name in shown
    ]


def number(value: float, unit: str = "") -> str:
    """Four digits that matter, and the unit.

    >>> number(31244.7, "tokens/s"), number(0.66683), number(3.0, "of 4"), number(0.000123)
    ('31,245 tokens/s', '0.6668', '3 of 4', '0.000123')
    >>> number(3912192, "bytes"), number(7.5712e12, "FLOP")
    ('3.7 MiB', '7.571 TFLOP')
    """
    if unit == "bytes":
        return size_of(value)
    if unit == "FLOP" and value >= 1000:
        power = min(int(math.log10(value)) // 3, len(PREFIXES))
        return f"{value / 1000**power:.4g} {PREFIXES[power - 1]}FLOP"
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def interval(metric: dict[str, Any]) -> str:
    return "" if metric["low"] is None else f"{number(metric['low'])} to {number(metric['high'])}"


def model_line(lm: dict[str, Any]) -> str:
    """The model in a line: spec, size, precision, place, fingerprint."""
    size = "" if lm.get("parameters") is None else f"{lm['parameters']:,} parameters, "
    return f"{lm['spec']}: {size}{size_of(lm['bytes'])}, {lm['dtype']} on {lm['device']} ({lm['fingerprint']})"


def size_of(count: float) -> str:
    """Bytes as people say them.

    >>> size_of(3912192)
    '3.7 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
