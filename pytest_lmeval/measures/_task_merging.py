"""Merge what several processes answered of a task, each a share of the questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from msgspec import structs

from pytest_lmeval.measures._merging import merged_record
from pytest_lmeval.measures._task_record import counted_notes, sum_of_hashes, withheld
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._measured import Record, withheld_of
from pytest_lmeval.records._metric import Metric, is_declared, metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._metrics import Scores, kept_score
from pytest_lmeval.scoring._several import Spread

SUMS = (
    "questions", "answers", "truncated", "fewer_shots", "retokenized", "ties", "tokens_read", "tokens_alone", "padding",
    "calls", "special_tokens", "from_other_batches",
)  # fmt: skip
UNKNOWN = (
    "It is no mean of what each answer scores, and what it is computed from is in no file of a shard. Run the same tests with "
    "--lmeval-dir on the merged folder: the answers are there, and nothing is asked again."
)


def merged(records: Sequence[Record], examples: Iterable[Example], others: Sequence[Metric] = ()) -> Record:
    """The record of a task of which each record is about a share, from all examples; they are read once, and not held.

    others  metrics of the task that are not registered, and no means of scores: those of another harness
    """
    first = merged_record(records, counted_notes, SUMS)
    metrics, lost = _metrics(records, {one.name: one for one in others})
    scores, spread, outcomes = Scores(metrics), Spread([one.name for one in metrics]), Counter[str]()
    for example in examples:
        scores.add(example)
        spread.add(example)
        outcomes.update([example.outcome] if example.outcome else [])
    values = scores.values(first.settings.get("seed", 0))
    values, kept_back = withheld(first.details["most_cut_off"], metrics, values)
    kept_back |= dict.fromkeys(lost, UNKNOWN)
    details = {
        **first.details,
        "outcomes": dict(outcomes.most_common()),
        "withheld": kept_back,
        "between_runs": spread.values(),
    }
    if set(outcomes) <= {"answered"}:
        del details["outcomes"]
    details = {name: value for name, value in details.items() if value or name not in ("withheld", "between_runs")}
    if scored := _scored(records):
        details["scored"] = scored
    settings = {**first.settings, "prompts": sum_of_hashes(record.settings["prompts"] for record in records)}
    whole = structs.replace(first, metrics=values, details=details, settings=settings, not_measured=None)
    return structs.replace(whole, notes=[*whole.notes, *counted_notes(whole)])


def _scored(records: Sequence[Record]) -> dict[str, bool]:
    """The metrics of the scorer of the task, and whether each judges answers: in every share."""
    found: dict[str, bool] = {}
    for record in records:
        for name, judges in record.details.get("scored", {}).items():
            found[name] = found.get(name, True) and judges
    return found


def _metrics(records: Sequence[Record], others: dict[str, Metric]) -> tuple[list[Metric], list[str]]:
    """The metrics that the records have, in their order; and the names of those that cannot be computed."""
    by_row, found, lost = _scored(records), list[Metric](), list[str]()
    values: dict[str, Value | None] = {}
    for record in records:
        values |= {name: value for name, value in record.metrics.items() if values.get(name) is None}
        values |= {name: None for name in withheld_of(record) if name not in values}
    for name, value in values.items():
        if name in others:
            found.append(others[name])
        elif name in by_row:
            found.append(_of_scorer(name, value, judges=by_row[name]))
        elif is_declared(name):
            found.append(metric(name))
        else:
            lost.append(name)
    return found, lost


def _of_scorer(name: str, value: Value | None, *, judges: bool) -> Metric:
    """A metric whose scores the scorer of a task gave."""
    known: Any = metric(name, value)
    found: Metric = replace(
        known, score=kept_score(name), interval="mean", judges=judges, needs="an answer", library=None, norm=None
    )
    return found
