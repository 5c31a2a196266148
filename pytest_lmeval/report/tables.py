"""The rows that every rendering shows: which numbers of a record come first, and how a number reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pytest_lmeval.report.words import interval, model_line, number, told_apart

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
    "latency": ("ttft", "itl", "itl_p95", "e2e", "cold", "*_tokens_per_second"),
    "throughput": ("tokens_per_second", "decode_tokens_per_second", "knee_rows", "decode_knee_rows"),
    "streaming": ("chunk_latency", "chunk_latency_p95", "tokens_per_second", "slowing", "state_bytes"),
    "memory": ("weights_bytes", "state_bytes", "activations_bytes", "peak_bytes"),
    "efficiency": ("*_flops_per_token", "*_intensity", "*_share_of_bound"),
}

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
    models = {(record["lm"]["spec"], record["lm"]["fingerprint"]): model_line(record["lm"]) for record in records}
    return list(models.values()) if len(models) <= MANY else [f"{len(models)} models"]


def comparisons(records: list[dict[str, Any]], sort: str | None = None) -> list[Comparison]:
    """What several models have in common: the same verb on the same subject. Where a model has several such records, the first
    stands beside the first of the others, the second beside the second.

    sort  a metric: the models with the best value of it come first, those without it last
    """
    same: dict[tuple[str, str, int], dict[tuple[str, str], int]] = {}
    met: Counter[tuple[str, str, tuple[str, str]]] = Counter()
    for place, record in enumerate(records):
        if record["kind"] != "equivalence" and record["metrics"]:
            kind, subject, model = record["kind"], record["subject"], (record["lm"]["spec"], record["lm"]["fingerprint"])
            same.setdefault((kind, subject, met[kind, subject, model]), {})[model] = place
            met[kind, subject, model] += 1
    return [
        _comparison(kind, subject, records, sorted(by_model.items(), key=lambda item: best_first(records[item[1]], sort)))
        for (kind, subject, _), by_model in same.items()
        if len(by_model) > 1
    ]


def best_first(record: dict[str, Any], sort: str | None) -> tuple[bool, float]:
    """What records are sorted by so that the best value of a metric comes first; without a direction, the lowest."""
    metric = record["metrics"].get(sort)
    if metric is None:
        return True, 0.0
    return False, -metric["value"] if metric["higher_is_better"] else metric["value"]


def _comparison(
    kind: str, subject: str, records: list[dict[str, Any]], by_model: list[tuple[tuple[str, str], int]]
) -> Comparison:
    models, places = [model for model, _ in by_model], [place for _, place in by_model]
    shown = [records[place] for place in places]
    rows = [{row.metric: row for row in (*_rows(record), *_verdict(record))} for record in shown]
    names = dict.fromkeys(name for row in rows for name in row)
    metrics = {name: [row.get(name, Row(name, "", "", "")) for row in rows] for name in names}
    return Comparison(kind, subject, told_apart(models), [record.get("outcome", "") for record in shown], metrics, places)


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
            how=how(record),
            outcome=record.get("outcome", ""),
            rows=_rows(record),
        )
        for record in records
        if record["kind"] != "equivalence"
    ]


def how(record: dict[str, Any]) -> str:
    """What is not as one would expect of how it was measured."""
    settings = record["settings"]
    return _task(settings) if record["kind"] == "task" else _windows(settings) or _machine(settings)


def _machine(settings: dict[str, Any]) -> str:
    """What is to be known of times: that they vary more than on a quiet machine, and what could not be timed."""
    grade = settings.get("stability")
    failed = ", ".join(f"{rows} rows" for rows in settings.get("failed") or ())
    return ", ".join(filter(None, [grade if grade not in (None, "steady") else "", failed and f"failed with {failed}"]))


def _windows(settings: dict[str, Any]) -> str:
    if settings.get("reading") != "windows":
        return ""
    again = "as lm_eval reads them" if settings.get("rolling") else f"{settings.get('overlap') or 0:,} of them read again"
    return f"windows of {settings.get('window') or 0:,} tokens, {again}"


def _task(settings: dict[str, Any]) -> str:
    """What is not as one would expect of a task's answers."""
    counts = {name: settings.get(name) for name in ("truncated", "moved_borders", "ties", "not_questions", "not_asked")}
    said = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    reading = settings.get("reading", "each beginning once")
    return ", ".join([reading] * (reading != "each beginning once") + said)


def headlines(record: dict[str, Any]) -> list[str]:
    """The metrics of a record that a summary shows."""
    patterns = HEADLINES.get(record["kind"], ("*",))
    return list(dict.fromkeys(name for pattern in patterns for name in record["metrics"] if fnmatchcase(name, pattern)))


def _rows(record: dict[str, Any]) -> list[Row]:
    metrics, shown = record["metrics"], headlines(record)
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
