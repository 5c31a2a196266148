"""Score answers with their rows, by the `score` of the task: what one says of each answer, checked, and the metrics of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from msgspec import structs

from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._source_code import code_digest
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._metric import Metric, is_declared, metric as declared
from pytest_lmeval.tasks._task import Extracted, Score, Scorer, Task

REFUSED = "refused"  # the outcome of an answer that a scorer took nothing from
ONE = "score"  # the metric of a scorer that returns one number


@dataclass(frozen=True)
class RowScore:
    """What a scorer says of one answer; a score of None: nothing could be taken from it.

    scores     metric -> number
    extracted  metric -> what was taken from the answer, where the scorer tells
    """

    scores: dict[str, float | None]
    extracted: dict[str, str]

    def put_into(self, example: Example) -> Example:
        """The example with these scores, 0 for None; refused if all are."""
        refused = all(score is None for score in self.scores.values())
        scores = {name: score or 0.0 for name, score in self.scores.items()}
        outcome = REFUSED if refused and example.outcome in ("", "answered") else example.outcome
        return structs.replace(example, outcome=outcome, scores=scores | example.scores, extracted=self.extracted)


def score_by_row(task: Task, row: Any, example: Example) -> RowScore:
    """What the scorer of the task says of the answer to a row; without scores, if it says None.

    Of tied choices it is the mean over those that count, as for other metrics of texts. Raises TaskError, with the row and the
    value, where the scorer raises, or returns what is no score.
    """
    found = [_said(task, row, one) for one in example.resolved()]
    if len(found) == 1:
        return found[0]
    names = dict.fromkeys(name for one in found for name in one.scores)
    numbers = {name: [one.scores.get(name) for one in found] for name in names}
    means = {
        name: None if {*own} == {None} else math.fsum(score or 0.0 for score in own) / len(own) for name, own in numbers.items()
    }
    return RowScore(means, found[0].extracted)


def check_names(task: Task, example: Example, found: RowScore, before: Collection[str]) -> None:
    """Raise TaskError if the scorer gives an answer other scores than those before it."""
    if {*found.scores} != {*before}:
        raise TaskError(
            f"{task}, row {example.number} ({example.id}): the scorer returned scores named {', '.join(found.scores)}, and of "
            f"answers before it {', '.join(before)}. It returns the same names for each: None where one cannot be told, which "
            "counts as 0."
        )


def row_metrics(task: Task, names: Sequence[str], others: Sequence[Metric]) -> dict[str, Metric]:
    """The metrics of these names, whose scores the scorer of the task gives: a declared one keeps its declaration.

    Raises TaskError for a name that one of the `others` has, and for a declared metric that is no mean of scores of answers.
    """
    return {name: _metric_of(task, name, {other.name for other in others}) for name in names}


def scorer_name(score: Scorer) -> str:
    """A name of the scorer for the settings of a record: two runs with different ones are told apart, whatever it is called."""
    called = getattr(score, "__qualname__", type(score).__qualname__).partition(".<locals>")[0]
    return f"{called} {code_digest([score], own=True).hex()[:12]}"


def _metric_of(task: Task, name: str, others: set[str]) -> Metric:
    known = declared(name) if is_declared(name) else Metric(name, about=f"what the scorer of {task} says")
    why = None
    if name in others:
        why = "is among the `metrics` of the task, too: leave it out there"
    elif known.statistic is not None or known.sums is not None or known.aspect != "quality":
        why = "is a declared metric that is no mean of what single answers score: give it another name"
    if why is not None:
        raise TaskError(f"{task}: its `score` returns a score named {name!r}, which {why}.")
    judges = known.higher_is_better is not False
    return replace(
        known,
        score=lambda example: example.scores[name],
        interval="mean",
        judges=judges,
        needs="an answer",
        library=None,
        norm=None,
    )


def _said(task: Task, row: Any, example: Example) -> RowScore:
    where = f"{task}, row {example.number} ({example.id})"
    assert task.score is not None
    try:
        said = task.score(row, example.output)
    except Exception as error:
        why = str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {error}"
        raise TaskError(
            f"{where}: the scorer raised {why}, on the answer {_short(example.output)}. Finished answers are kept: correct the "
            "scorer, and only scores are computed again."
        ) from error
    if said is None:
        return RowScore({}, {})
    if isinstance(said, Mapping) and (not said or not all(isinstance(name, str) and name for name in said)):
        raise _nonsense(where, said, example)
    several: dict[str, Score] = {**said} if isinstance(said, Mapping) else {ONE: said}
    parts = {name: (one.score, one.text) if isinstance(one, Extracted) else (one, None) for name, one in several.items()}
    for number, text in parts.values():
        is_number = isinstance(number, Real | np.bool_) and math.isfinite(number)
        if not (number is None or is_number) or not (text is None or isinstance(text, str)):
            raise _nonsense(where, said, example)
    scores = {name: None if number is None else float(number) for name, (number, _) in parts.items()}  # type: ignore[arg-type]
    return RowScore(scores, {name: text for name, (_, text) in parts.items() if text is not None})


def _nonsense(where: str, said: Any, example: Example) -> TaskError:
    return TaskError(
        f"{where}: the scorer returned {_short(said)} for the answer {_short(example.output)}. It returns True or False, a "
        "finite number, an Extracted with one, several of these by name, or None if nothing can be taken from the answer. "
        "Finished answers are kept."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
