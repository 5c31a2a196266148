"""The verbs of the `lmeval` fixture: measure, record under the test's name, and go on where a killed run stopped.

Each verb is the plain function of the same name (usable without pytest) with four things around it: the defaults of
the command line, the journal, the verdict that a streamed number stands on, and a progress bar.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from pytest_lmeval.benchmarking import Driver
from pytest_lmeval.measures import _old_laws as laws
from pytest_lmeval.measures import _old_learning as learning
from pytest_lmeval.measures import _old_quality as quality
from pytest_lmeval.measures import _old_speed as speed
from pytest_lmeval.measures.context import EXPECTED, Desk
from pytest_lmeval.models.identity import facts
from pytest_lmeval.records.record import Record
from pytest_lmeval.records.value import Metric
from pytest_lmeval.session import Session, TestLog

P = ParamSpec("P")
R = TypeVar("R")


def verb(function: Callable[Concatenate[Desk, P], R]) -> Callable[Concatenate[Lmeval, P], R]:
    """The function as a method. An error that was meant for the user arrives as its message, at their own line."""

    @functools.wraps(function)
    def shown_at_the_call(self: Lmeval, *args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        try:
            return function(self._desk, *args, **kwargs)
        except EXPECTED as error:
            raise error.with_traceback(None) from None

    return shown_at_the_call  # type: ignore[return-value]  # whose first parameter may be named


def record(desk: Desk, /, lm: Any, subject: str, **metrics: float) -> Record:
    """Record numbers of your own beside ours: they stand in the summary and the reports like any other.

    lmeval.record(lm, "passkey at 8k", accuracy=Metric(0.97, n=100, higher_is_better=True))
    """
    kept = {name: value if isinstance(value, Metric) else Metric(value) for name, value in metrics.items()}
    record = Record(kind="custom", subject=subject, lm=facts(desk.model(lm)), metrics=kept, test=desk.log.test)
    desk.log.records.append(record)
    return record


class Lmeval:
    """What a test measures with. Every call returns a result and keeps its record for the reports."""

    def __init__(self, session: Session, log: TestLog, benchmark: Any = None) -> None:
        self._desk = Desk(session, log, Driver(benchmark))

    def __repr__(self) -> str:
        return f"<lmeval of {self._desk.log.test}>"

    perplexity = verb(quality.perplexity)
    agreement = verb(quality.agreement)
    task = verb(quality.task)
    suite = verb(quality.suite)

    equivalence = verb(laws.equivalence)
    train = verb(learning.train)

    latency = verb(speed.latency)
    latency_grid = verb(speed.latency_grid)
    throughput = verb(speed.throughput)
    streaming = verb(speed.streaming)
    memory = verb(speed.memory)
    efficiency = verb(speed.efficiency)

    record = verb(record)
