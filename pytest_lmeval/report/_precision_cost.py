"""Build the section "What this precision cost": what a run recorded of a model and of the reference that it was compared with.

Every record of `lmeval.agreement` names a reference. The section joins to it what the same run recorded of both models:
weights, the tasks that both answered, question by question, and the times of both. Nothing is measured for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import RunDocument, Section
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._measured import ModelFacts, Record, withheld_of
from pytest_lmeval.records._metric import Metric, judge_of, metric
from pytest_lmeval.report._examples import examples_in, judge_in
from pytest_lmeval.report._words import disambiguate, interval, number, several

TITLE = "What this precision cost"
TEXT = (
    "A ratio is the model's number over that of its reference. A question is lost where the model scores less than the "
    "reference, won where it scores more. The times were taken one after the other: a ratio near 1 may be noise."
)
COLUMNS = ["number", "reference", "model", "cost", "95 % interval"]
TIMED = {"latency": ("ttft", "itl"), "throughput": ("tokens_per_second", "decode_tokens_per_second")}
HOW = {  # settings that say how something was computed, or how often, and not what
    "task": ("batch_size", "invariant"),
    "latency": ("runs", "warm_up"),
    "throughput": ("runs", "warm_up", "seconds"),
}
Row = list[Any]


@dataclass
class Comparison:
    """A model, its reference, and the records of their agreement."""

    lm: ModelFacts
    reference: ModelFacts
    records: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class Flips:
    """How the answers to the questions that two models answered differ.

    difference  of the means, the model's minus that of the reference, with its 95 % interval if it is known
    """

    lost: int
    won: int
    questions: int
    difference: float
    interval: tuple[float, float] | None


def section(document: RunDocument, folder: Path | None) -> Section | None:
    """The section of a run; None without a record of agreement, and for several runs side by side."""
    if document.runs or not (found := comparisons(document.records)):
        return None
    models = list(dict.fromkeys(_identity(facts) for one in found for facts in (one.lm, one.reference)))
    labels = dict(zip(models, disambiguate(models), strict=True))
    names = [" against ".join(labels[_identity(facts)] for facts in (one.lm, one.reference)) for one in found]
    blocks = [_rows(one, document.records, folder) for one in found]
    if len(found) == 1:
        return Section(TITLE, text=f"{names[0]}. {TEXT}", columns=COLUMNS, rows=blocks[0])
    rows = [[name, *row] for name, block in zip(names, blocks, strict=True) for row in block]
    return Section(TITLE, text=TEXT, columns=["model", *COLUMNS], rows=rows)


def comparisons(records: Iterable[Record]) -> list[Comparison]:
    """The pairs of models whose agreement was measured."""
    found: dict[tuple[str, ...], Comparison] = {}
    for record in records:
        if record.kind == "agreement" and record.metrics and isinstance(record.settings.get("reference"), dict):
            reference = schema.convert(record.settings["reference"], ModelFacts)
            key = (*_identity(record.lm), *_identity(reference))
            found.setdefault(key, Comparison(record.lm, reference)).records.append(record)
    return list(found.values())


def flips(reference: Iterable[Example], model: Iterable[Example], judge: Metric) -> Flips | None:
    """Compare two models by what their answers score in a metric; None if there is no question that both answered.

    Where questions have several answers, drawn at random, their means are compared.
    """
    from pytest_lmeval.statistics._drawn import drawn_difference  # loads numpy
    from pytest_lmeval.statistics._paired import paired_difference

    (before, groups), (after, _) = _answers(reference, judge), _answers(model, judge)
    if not (common := [question for question in after if question in before]):
        return None
    base, new = ([side[question] for question in common] for side in (before, after))
    means = [[sum(scores) / len(scores) for scores in side] for side in (base, new)]
    changes = [now - was for was, now in zip(*means, strict=True)]
    shared = [groups[question] for question in common]
    if any(len(scores) > 1 for scores in (*base, *new)):
        difference = drawn_difference(base, new, shared)
    else:
        difference = paired_difference(means[0], means[1], groups=shared)
    known = difference.low is not None and difference.high is not None
    low, high = (judge.scale * (end or 0.0) for end in (difference.low, difference.high))
    lost, won = sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    return Flips(lost, won, len(common), judge.scale * difference.value, (low, high) if known else None)


def _rows(one: Comparison, records: Sequence[Record], folder: Path | None) -> list[Row]:
    tasks = [row for pair in _pairs(one, records, "task") for row in _of_task(*pair, folder)]
    times = [row for kind in TIMED for pair in _pairs(one, records, kind) for row in _of_times(*pair)]
    return [
        *_of_weights(one.reference, one.lm),
        *(row for record in one.records for row in _of_agreement(record, one.reference)),
        *(tasks or [["tasks", "", "", "lmeval.task of both, asked alike, adds the questions lost and won", ""]]),
        *(times or [["speed", "", "", "lmeval.latency or lmeval.throughput of both, timed alike, adds the ratios", ""]]),
    ]


def _pairs(one: Comparison, records: Iterable[Record], kind: str) -> Iterator[tuple[Record, Record]]:
    """The records of the reference and of the model that are about the same, the second of one with the second of the other."""
    alike: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for record in records:
        if record.kind == kind and record.metrics:
            settings = {name: value for name, value in record.settings.items() if name not in HOW[kind]}
            device = "" if kind == "task" else record.lm.device
            sides = alike[schema.line_of([record.subject, device, sorted(settings.items())])]
            for facts, side in zip((one.reference, one.lm), sides, strict=True):
                if _identity(record.lm) == _identity(facts):
                    side.append(record)
    for references, models in alike.values():
        yield from zip(references, models, strict=False)


def _of_weights(reference: ModelFacts, lm: ModelFacts) -> Iterator[Row]:
    before, after = reference.precision, lm.precision
    if before and after:
        yield ["precision of the weights", before.name, after.name, "", ""]
    if reference.bytes and lm.bytes:
        sizes = (number(facts.bytes, "bytes") for facts in (reference, lm))
        yield ["bytes", *sizes, _times(lm.bytes / reference.bytes), ""]
    if before and after:
        for label, attribute in (("value", "bits_per_weight"), ("stored", "stored_bits_per_weight")):
            was, now = getattr(before, attribute), getattr(after, attribute)
            if was and now:
                yield [f"bits per weight, {label}", number(was), number(now), _times(now / was), ""]


def _of_agreement(record: Record, reference: ModelFacts) -> Iterator[Row]:
    corpus = record.subject.removesuffix(f" with {reference.spec}")  # a kept file stays named
    if n := next((value.n for value in record.metrics.values() if value.n), None):
        corpus += f", {several(n, 'token')}"
    bound = "kl_at_least" in record.metrics
    kl, prefix = ("kl_at_least", "at least ") if bound else ("kl", "")
    tail = next((name for name in ("p99", "p95", "p90") if f"{kl}_{name}" in record.metrics), "p99")
    shown = [
        ("agreement", "same top token", ""),
        (kl, "mean KL", prefix),
        (f"{kl}_{tail}", f"KL, {tail}", prefix),
        (f"{kl}_max", "largest KL", prefix),
        ("nll_difference", "loss minus that of the reference", ""),
        ("perplexity_ratio", "perplexity ratio", ""),
    ]
    for name, label, said in shown:
        if (value := record.metrics.get(name)) is not None:
            text = _times(value, 5) if name == "perplexity_ratio" else said + number(value, value.unit)
            bounded = ", a lower bound" if said else ""
            yield [f"{label}{bounded}: {corpus}", "", "", text, interval(value)]


def _of_task(reference: Record, lm: Record, folder: Path | None) -> Iterator[Row]:
    withheld = withheld_of(reference) | withheld_of(lm)
    judge = judge_in(reference) or judge_in(lm) or judge_of(metric(name) for name in withheld)
    if judge is None:
        return
    label = f"{lm.subject}: {judge.label}"
    values = [record.metrics.get(judge.name) for record in (reference, lm)]
    shown = ["not measured" if value is None else number(value, value.unit) for value in values]
    if None in values:
        yield [label, *shown, withheld.get(judge.name, ""), ""]
        return
    found, notes = None, list[str]()
    if folder is None or not (reference.examples and lm.examples):
        notes.append("the run kept no files of examples")
    else:
        before, after = (examples_in(folder, record.examples or "", notes) for record in (reference, lm))
        found = flips(before, after, judge)
    if found is None:
        yield [label, *shown, "; ".join(["questions lost and won: unknown", *notes]), ""]
        return
    counted = f"{found.lost:,} lost, {found.won:,} won of {several(found.questions, 'question')}"
    between = "" if found.interval is None else " to ".join(map(number, found.interval))
    yield [label, *shown, "; ".join([f"{found.difference:+.4g} ({counted})", *notes]), between]


def _of_times(reference: Record, lm: Record) -> Iterator[Row]:
    for name in TIMED[lm.kind]:
        was, now = reference.metrics.get(name), lm.metrics.get(name)
        if was and now:
            cells = [number(value, value.unit) + (f" ({interval(value)})" if value.interval else "") for value in (was, now)]
            yield [f"{metric(name, now).label}: {lm.subject}", *cells, _times(now / was, 3), ""]


def _answers(examples: Iterable[Example], judge: Metric) -> tuple[dict[Any, list[float]], dict[Any, Any]]:
    """What the answers to each question score, and what each question shares with others."""
    scores: dict[Any, list[float]] = {}
    groups: dict[Any, Any] = {}
    for example in examples:
        if (score := example.scores.get(judge.name)) is not None:
            question = example.id, example.number
            scores.setdefault(question, []).append(score)
            groups[question] = question if example.group is None else example.group
    return scores, groups


def _identity(facts: ModelFacts) -> tuple[str, str]:
    """A spec may name other weights in another run, and the same weights may be stepped otherwise under another spec."""
    return facts.spec, facts.fingerprint


def _times(ratio: float, digits: int = 4) -> str:
    return f"x {ratio:.{digits}g}"
