"""Build the rows of the summaries, as text: the headline numbers of each record, verdicts, and models side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_lmeval.records._certificate import EXACT
from pytest_lmeval.records._measured import Record, withheld_of
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.report._words import disambiguate, interval, model_line, number

MANY = 12  # models, above which only their number is shown


@dataclass(frozen=True)
class Row:
    """One number of a record; `metric` is its label."""

    metric: str
    value: str
    interval: str = ""
    n: str = ""


@dataclass(frozen=True)
class Group:
    """A record with the numbers and notes that a summary shows."""

    record: Record
    rows: list[Row]
    notes: str


@dataclass(frozen=True)
class SideBySide:
    """Several models on one subject.

    models   labels
    metrics  name -> a row of each model, with an empty value if the model lacks the metric
    indices  of the records of the models
    """

    kind: str
    subject: str
    models: list[str]
    outcomes: list[str]
    metrics: dict[str, list[Row]]
    indices: list[int]


@dataclass(frozen=True)
class VerdictRow:
    """The verdict on the laws of one model."""

    record: Record
    verdict: str
    broken: str
    coverage: str
    worst_ratio: str


def verdicts(records: Sequence[Record]) -> list[VerdictRow]:
    """A row for each model whose laws were tested; of many models, those that are not exact first."""
    found = []
    for record in records:
        if (certificate := record.certificate) is None or not record.is_verdict:
            continue
        found.append(
            VerdictRow(
                record=record,
                verdict=certificate.verdict,
                broken=", ".join(certificate.with_status("broken")),
                coverage=certificate.coverage,
                worst_ratio="" if certificate.worst_ratio is None else number(certificate.worst_ratio),
            )
        )
    if len(found) > MANY:
        found.sort(key=lambda row: (row.verdict == EXACT, row.record.lm.spec))
    return found


def model_lines(records: Sequence[Record]) -> list[str]:
    """A line for each model; for many models, one line with their number."""
    models = {(record.lm.spec, record.lm.fingerprint): model_line(record.lm) for record in records}
    return list(models.values()) if len(models) <= MANY else [f"{len(models)} models"]


def side_by_side(records: Sequence[Record], sort: str | None = None) -> list[SideBySide]:
    """Compare models that ran the same verb on the same subject. A model's second such record is beside the second of others.

    sort  a metric: the models with its best value come first, those without it last
    """
    same: dict[tuple[str, str, int], dict[tuple[str, str], int]] = {}
    seen: Counter[tuple[str, str, str, str]] = Counter()
    for index, record in enumerate(records):
        if record.metrics and not record.is_verdict:
            kind, subject, model = record.kind, record.subject, (record.lm.spec, record.lm.fingerprint)
            same.setdefault((kind, subject, seen[(kind, subject, *model)]), {})[model] = index
            seen[(kind, subject, *model)] += 1
    found = []
    for (kind, subject, _), by_model in same.items():
        if len(by_model) > 1:
            models, indices = zip(*sorted(by_model.items(), key=lambda item: best_first(records[item[1]], sort)), strict=True)
            shown = [records[index] for index in indices]
            rows = [_rows(record) | _verdict(record) for record in shown]
            labels = {name: row.metric for own in rows for name, row in own.items()}
            metrics = {name: [own.get(name, Row(label, "")) for own in rows] for name, label in labels.items()}
            outcomes = [record.outcome for record in shown]
            found.append(SideBySide(kind, subject, disambiguate(models), [*outcomes], metrics, [*indices]))
    return found


def best_first(record: Record, sort: str | None) -> tuple[bool, float]:
    """Sort key that puts the best value of a metric first; for a metric without a direction, the lowest."""
    value = record.metrics.get(sort or "")
    if value is None:
        return True, 0.0
    return False, -float(value) if value.higher_is_better else float(value)


def groups(records: Sequence[Record]) -> list[Group]:
    """The records, without verdicts on laws, with their headline numbers."""
    return [
        Group(record, list(_rows(record).values()), ", ".join(notes_of(record))) for record in records if not record.is_verdict
    ]


def notes_of(record: Record) -> list[str]:
    """The verdict that the record's numbers rest on, and its notes."""
    return [*([record.certificate.summary] if record.certificate else []), *record.notes]


def headlines(record: Record) -> list[str]:
    """The headline metrics of a record; all metrics if none is declared a headline."""
    shown = {name: metric(name, value).headline for name, value in record.metrics.items()}
    names = [name for name, always in shown.items() if always is True or (always and record.metrics[name] > 0)]
    return names or list(record.metrics)


def _verdict(record: Record) -> dict[str, Row]:
    return {"verdict": Row("verdict", record.certificate.summary)} if record.certificate else {}


def _rows(record: Record) -> dict[str, Row]:
    if not record.metrics:
        return {"": Row(record.kind, "not measured", record.not_measured or "")}
    withheld = {name: Row(metric(name).label, "not measured", why) for name, why in withheld_of(record).items()}
    return withheld | {name: _row(name, record.metrics[name]) for name in headlines(record)}


def _row(name: str, value: Value) -> Row:
    n = "" if value.n is None else f"{value.n:,}"
    return Row(metric(name, value).label, number(value, value.unit), interval(value), n)
