"""Declare a suite: tasks whose first metrics are averaged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks._checks import several
from pytest_lmeval.tasks._task import Task


@dataclass(frozen=True)
class Average:
    """An average over tasks of a suite that another harness declares.

    metric    what is averaged, where a task has it
    tasks     their names
    weighted  by the number of their questions
    filters   those of the answers that count: "strict-match"; None: each that a task has
    within    the name of the group inside of the suite; empty: the suite itself
    """

    metric: str
    tasks: tuple[str, ...]
    weighted: bool = False
    filters: tuple[str, ...] | None = None
    within: str = ""


@dataclass(frozen=True)
class Suite:
    """Tasks whose first metrics are averaged, each with the same weight, or with its number of questions if `weighted`; or
    whose `averages` another harness declares. `finetuned` is one task with the questions of all, on which models are fine-tuned
    once."""

    name: str
    tasks: tuple[Task, ...]
    weighted: bool = False
    averages: tuple[Average, ...] | None = None
    finetuned: Task | None = None

    def __str__(self) -> str:
        return self.name

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", several("tasks", self.tasks))
        names = list(map(str, self.tasks))
        if not self.tasks or not all(isinstance(task, Task) for task in self.tasks):
            raise TaskError(f"the suite {self} has tasks {names}: it has at least one, and each is a Task (see `tasks.find`).")
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise TaskError(f"the suite {self} has several tasks called {' and '.join(twice)}. Results are kept by name.")
        if "average" in names:
            raise TaskError(f"a task of the suite {self} is called 'average', as its average is. Give it another name.")


def by_name(*items: Task | Suite) -> dict[str, Task | Suite]:
    """Tasks and suites by their names: the object of a family's entry point (see `pytest_lmeval.registry`)."""
    found = {item.name: item for item in items}
    if len(found) < len(items):
        raise TaskError(f"two of {', '.join(map(str, items))} have the same name, so only one would be found.")
    return found
