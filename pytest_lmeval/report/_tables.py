"""The rows of the summaries: which numbers of a record they show, and what several models have in common, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_lmeval.records._certificate import EXACT
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.report._words import disambiguate, interval, model_line, number

MANY = 12  # models, beyond which they are not described one by one


@dataclass(frozen=True)
class Row:
    """One number of a record; `metric` is what tables call it."""

    metric: str
    value: str
    interval: str = ""
    n: str = ""


@dataclass(frozen=True)
class Group:
    """A record with the numbers that a summary shows."""

    test: str
    lm: str
    subject: str
    verdict: str
    notes: str
    outcome: str
    rows: list[Row]


@dataclass(frozen=True)
class SideBySide:
    """Several models on one subject.

    metrics  name -> a row of each model, in their order, with an empty value where a model lacks the metric
    records  indices of the records that it shows
    """

    kind: str
    subject: str
    models: list[str]
    outcomes: list[str]
    metrics: dict[str, list[Row]]
    records: list[int]


@dataclass(frozen=True)
class VerdictRow:
    """What was found about the laws of one model."""

    lm: str
    verdict: str
    broken: str
    covered: str
    worst_ratio: str
    outcome: str


def verdicts(records: Sequence[Record]) -> list[VerdictRow]:
    """A row for each model whose laws were tested; of very many, those that are not exact come first."""
    found = []
    for record in records:
        if (certificate := record.certificate) is None or not record.is_verdict:
            continue
        laws = certificate.laws
        cases = sum(law.cases for law in laws.values())
        found.append(
            VerdictRow(
                lm=record.lm.spec,
                verdict=certificate.verdict,
                broken=", ".join(name for name in laws if name in certificate.broken),
                covered=f"{cases:,} cases" + (f", up to {certificate.longest:,} tokens" if certificate.longest else ""),
                worst_ratio="" if certificate.worst_ratio is None else number(certificate.worst_ratio),
                outcome=record.outcome,
            )
        )
    if len(found) > MANY:
        found.sort(key=lambda row: (row.verdict == EXACT, row.lm))
    return found


def model_lines(records: Sequence[Record]) -> list[str]:
    """The models in a line each; of very many, only how many they are."""
    models = {(record.lm.spec, record.lm.fingerprint): model_line(record.lm) for record in records}
    return list(models.values()) if len(models) <= MANY else [f"{len(models)} models"]


def side_by_side(records: Sequence[Record], sort: str | None = None) -> list[SideBySide]:
    """What several models have in common: the same verb on the same subject. Where a model has several such records, the first
    stands beside the first of the others, the second beside the second.

    sort  a metric: the models with the best value of it come first, those without it last
    """
    same: dict[tuple[str, str, int], dict[tuple[str, str], int]] = {}
    seen: Counter[tuple[str, str, tuple[str, str]]] = Counter()
    for index, record in enumerate(records):
        if record.metrics and not record.is_verdict:
            kind, subject, model = record.kind, record.subject, (record.lm.spec, record.lm.fingerprint)
            same.setdefault((kind, subject, seen[kind, subject, model]), {})[model] = index
            seen[kind, subject, model] += 1
    return [
        _side_by_side(kind, subject, records, sorted(by_model.items(), key=lambda item: best_first(records[item[1]], sort)))
        for (kind, subject, _), by_model in same.items()
        if len(by_model) > 1
    ]


def best_first(record: Record, sort: str | None) -> tuple[bool, float]:
    """What records are sorted by so that the best value of a metric comes first; without a direction, the lowest."""
    value = record.metrics.get(sort or "")
    if value is None:
        return True, 0.0
    return False, -float(value) if value.higher_is_better else float(value)


def _side_by_side(
    kind: str, subject: str, records: Sequence[Record], by_model: list[tuple[tuple[str, str], int]]
) -> SideBySide:
    models, indices = [model for model, _ in by_model], [index for _, index in by_model]
    shown = [records[index] for index in indices]
    rows = [_rows(record) | _verdict(record) for record in shown]
    labels = {name: row.metric for own in rows for name, row in own.items()}
    metrics = {name: [own.get(name, Row(label, "")) for own in rows] for name, label in labels.items()}
    return SideBySide(kind, subject, disambiguate(models), [record.outcome for record in shown], metrics, indices)


def _verdict(record: Record) -> dict[str, Row]:
    return {"verdict": Row("verdict", record.certificate.verdict)} if record.certificate else {}


def groups(records: Sequence[Record]) -> list[Group]:
    """The records with the numbers that a summary shows."""
    return [
        Group(
            test=record.test,
            lm=record.lm.spec,
            subject=record.subject,
            verdict=record.certificate.verdict if record.certificate else "",
            notes=", ".join(record.notes),
            outcome=record.outcome,
            rows=list(_rows(record).values()),
        )
        for record in records
        if not record.is_verdict
    ]


def headlines(record: Record) -> list[str]:
    """The metrics of a record that summaries show; all, where none of them is declared a headline."""
    names = [name for name, value in record.metrics.items() if metric(name, value).headline]
    return names or list(record.metrics)


def _rows(record: Record) -> dict[str, Row]:
    if not record.metrics:
        return {"": Row(record.kind, "not measured", record.not_measured or "")}
    return {name: _row(name, record.metrics[name]) for name in headlines(record)}


def _row(name: str, value: Value) -> Row:
    n = "" if value.n is None else f"{value.n:,}"
    return Row(metric(name, value).label, number(value, value.unit), interval(value), n)
