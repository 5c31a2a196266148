"""Find a task by its name, `find("boolq")`, or a suite of tasks, `find_suite("glue")`.

A family is a file here and a line in pyproject.toml (see `pytest_lmeval.registry`). Prompts are those of EleutherAI's
lm-evaluation-harness 0.4.13, character for character, except for `squad`, `stdlib_next` and SmallBench (`smallbench:sst2`).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from pytest_lmeval import registry
from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks._questions import Choices, Generate, Question
from pytest_lmeval.tasks._rows import id_of
from pytest_lmeval.tasks._suite import Suite, by_name
from pytest_lmeval.tasks._task import Ask, Extracted, Judge, Score, Scorer, Task

__all__ = [
    "Ask", "Choices", "Extracted", "Generate", "Judge", "Question", "Score", "Scorer", "Suite", "Task", "by_name", "find",
    "find_suite", "id_of", "names",
]  # fmt: skip


def find(name: str) -> Task:
    """The task of this name. Raises RegistryError if there is none, with the nearest name, and TaskError if it is a suite.

    >>> find("boolq").rows
    Rows(name='aps/super_glue', config='boolq', split='validation', revision=None)
    """
    found = _registered(name)
    if isinstance(found, Suite):
        one = f'one by its name, such as "{found.tasks[0]}"'
        raise TaskError(f'{name} is a suite of {len(found.tasks)} tasks. Ask all by `lmeval.suite(lm, "{name}")`, or {one}.')
    return found


def find_suite(name: str) -> Suite:
    """The suite of this name. Raises RegistryError if there is none, with the nearest name, and TaskError if it is a task.

    >>> suite = find_suite("superglue")
    >>> len(suite.tasks), str(suite.tasks[0])
    (8, 'boolq')
    """
    found = _registered(name)
    if isinstance(found, Task):
        raise TaskError(f'{name} is a task, not a suite. Ask it by `lmeval.task(lm, "{name}")`.')
    return found


def names(pattern: str = "*") -> list[str]:
    """The names of tasks that match the pattern, without suites.

    >>> names("smallbench:*")
    ['smallbench:sst2', 'smallbench:rte', 'smallbench:boolq', 'smallbench:mrpc']
    """
    return [name for name, thing, _ in registry.things("tasks") if isinstance(thing, Task) and fnmatchcase(name, pattern)]


def _registered(name: str) -> Task | Suite:
    """The task or suite of this name; a registered function makes one from the text after the colon."""
    thing, rest = registry.resolve("tasks", name) or (None, None)
    if thing is None or (isinstance(thing, Task | Suite) and rest is not None):
        raise registry.unknown("tasks", name)
    if callable(thing):
        thing = thing(rest or "")
    if not isinstance(thing, Task | Suite):
        raise TaskError(f"the task {name!r} is registered as a {type(thing).__name__}: it must be a Task or a Suite.")
    return thing
