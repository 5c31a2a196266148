"""Record numbers of the user's own."""

from __future__ import annotations

from typing import Any

from pytest_lmeval.errors import ArgumentError
from pytest_lmeval.measures._context import current, shared_verb
from pytest_lmeval.models._identity import facts
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value


@shared_verb
def record(lm: Any, subject: str, **metrics: float) -> Record:
    """Record numbers of your own: summary and reports show them like any other.

    metrics  by name; a plain number gets the unit and direction of the registered metric of that name, if there is one

        lmeval.record(lm, "passkey at 8k", accuracy=Value(0.97, n=100, higher_is_better=True))
    """
    context = current()
    if not isinstance(subject, str):
        raise ArgumentError(f"the subject of a record is a text that says what was measured; got {subject!r}.")
    values = {}
    for name, value in metrics.items():
        try:
            values[name] = value if isinstance(value, Value) else value_of(name, value)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{name}={value!r} cannot be recorded: {error}. Give a finite number, or a Value.") from None
    made = Record(kind="custom", subject=subject, lm=facts(context.model(lm)), metrics=values, test=context.log.test)
    context.log.records.append(made)
    return made
