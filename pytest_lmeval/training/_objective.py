"""Define what the loop of a training asks of what is learned: its batches, the loss of one, and what is held out."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, Protocol

from torch import Tensor

from pytest_lmeval.models._model import Model
from pytest_lmeval.profiling._peak import Peak
from pytest_lmeval.records._measured import Record
from pytest_lmeval.training._run import Run


class Batch(Sized, Protocol):
    """The rows of an update, which can be sliced: a tensor of crops, a list of questions."""

    def __getitem__(self, rows: slice, /) -> Any: ...


class Objective(Protocol):
    """What is learned from one text, or from the questions of one task.

    batch_size  rows of an update
    steps       updates in all
    unit        what a row counts in progress: its tokens, or 1
    item        the name of what is held out: "crop", "question"
    holds_out   whether anything is
    """

    @property
    def batch_size(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def unit(self) -> int: ...
    @property
    def item(self) -> str: ...
    @property
    def holds_out(self) -> bool: ...

    def batches(self, first: int = 0) -> Iterator[Any]:
        """The batches of all updates from `first` on, without end."""

    def loss(self, lm: Model, rows: Any) -> Tensor:
        """The mean loss of rows of a batch, in nats, with its gradient."""

    def evaluate(self, lm: Model, rows: int) -> Tensor:
        """Nats of each thing that is held out, [n] float64 on the CPU, read `rows` at once."""

    def refuse(self, run: Run) -> None:
        """Raise TrainingError for a training that is not worth going on with."""

    def record(self, run: Run, trained: Model, peak: Peak) -> Record:
        """The record of the training that gave the model."""
