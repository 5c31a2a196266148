"""Tasks by their names: `find("boolq")`, and suites of them: `find_suite("glue")`.

A family of tasks is one file beside this one, imported when one of its tasks is asked for. A style says whose prompts they
are: "lm_eval" those of EleutherAI's lm-evaluation-harness 0.4.13, character for character; "smallbench" short ones. The tasks
`squad` and `stdlib_next`, which that harness does not have, are found beside its own.
"""

from __future__ import annotations

import difflib
import importlib
from fnmatch import fnmatchcase

from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks.questions import Suite, Task

__all__ = ["find", "find_suite", "names"]

STYLE = "lm_eval"

# style -> file -> the names of its tasks
FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "lm_eval": {
        "glue": ("cola", "sst2", "mrpc", "qqp", "mnli", "mnli_mismatch", "qnli", "rte", "wnli"),
        "superglue": ("boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc"),
        "squad": ("squad", "squadv2"),
        "mmlu": ("mmlu_*",),
        "hellaswag": ("hellaswag",),
        "arc": ("arc_easy", "arc_challenge"),
        "piqa": ("piqa",),
        "lambada": ("lambada_openai",),
        "stdlib": ("stdlib_next",),
    },
    "smallbench": {"smallbench": ("sst2", "rte", "boolq", "mrpc")},
}

# suite -> its style; each lies in the file of its own name
SUITES = {"arc": "lm_eval", "glue": "lm_eval", "mmlu": "lm_eval", "smallbench": "smallbench", "superglue": "lm_eval"}


def find(name: str, style: str = STYLE) -> Task:
    """The task called `name`, with the prompts of a style. Raises TaskError where there is none, and tells which there are.

    >>> find("boolq").rows
    Rows(name='aps/super_glue', config='boolq', split='validation', revision=None)
    """
    _check(style)
    for file, patterns in FILES[style].items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            for task in _tasks(file):
                if task.name == name:
                    return task
    if name in SUITES:
        members = find_suite(name).tasks
        raise TaskError(
            f"{name} is a suite of {len(members)} tasks, not a task. Ask for all of them and their average by "
            f'`lmeval.suite(lm, "{name}")`, or for one of them by its name, such as "{members[0]}".'
        )
    listed = ", ".join(pattern for patterns in FILES[style].values() for pattern in patterns)
    others = [other for other in FILES if other != style and name in names(other)]
    raise TaskError(
        f"there is no task {name!r} of style {style!r}.{_meant(name, names(style))} Tasks of this style are {listed}; "
        f"suites are {', '.join(SUITES)}." + (f" It is a task of style {' and '.join(map(repr, others))}." if others else "")
    )


def find_suite(name: str, style: str = STYLE) -> Suite:
    """The suite called `name`. Each has one style only, and is found without naming it; another one than that is refused.

    Raises TaskError where there is none, and tells which there are.

    >>> suite = find_suite("superglue")
    >>> len(suite.tasks), str(suite.tasks[0])
    (8, 'boolq')
    """
    _check(style)
    if name in SUITES and style in (STYLE, SUITES[name]):
        suite: Suite = importlib.import_module(f"{__name__}.{name}").SUITE
        return suite
    if name in SUITES:
        raise TaskError(f"the suite {name} has the prompts of style {SUITES[name]!r} only; it was asked for in {style!r}.")
    single = f' "{name}" is a task: `lmeval.task(lm, "{name}")`.' if name in names(style) else ""
    raise TaskError(f"there is no suite {name!r}.{single or _meant(name, SUITES)} Suites are {', '.join(SUITES)}.")


def names(style: str = STYLE) -> list[str]:
    """All tasks of a style; imports all of its files.

    >>> names("smallbench")
    ['sst2', 'rte', 'boolq', 'mrpc']
    """
    _check(style)
    return [task.name for file in FILES[style] for task in _tasks(file)]


def _tasks(file: str) -> tuple[Task, ...]:
    tasks: tuple[Task, ...] = importlib.import_module(f"{__name__}.{file}").TASKS
    return tasks


def _check(style: str) -> None:
    if style not in FILES:
        raise TaskError(f"there is no style {style!r} of prompts; styles are {', '.join(FILES)}.")


def _meant(name: str, known: list[str] | dict[str, str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""
