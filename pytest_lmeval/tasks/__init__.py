"""Tasks by their names: `find("boolq")`, and suites of them: `find_suite("glue")`.

A family of tasks is one file beside this one, which is imported when one of its tasks is asked for. A style says whose prompts
they are: "lm_eval" those of EleutherAI's lm-evaluation-harness 0.4.13, character for character; "smallbench" short ones.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from types import ModuleType

from pytest_lmeval.task import Suite, Task, TaskError

STYLE = "lm_eval"

# style -> file -> the tasks in it; a name that ends in an underscore stands for all that begin with it
TASKS = {
    "lm_eval": {
        "glue": ("cola", "sst2", "mrpc", "qqp", "mnli", "mnli_mismatch", "qnli", "rte", "wnli"),
        "superglue": ("boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc"),
        "squad": ("squad", "squadv2"),
        "mmlu": ("mmlu_",),
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
    """The task called `name`, with the prompts of a style. Raises TaskError where there is none, with the names there are.

    >>> find("boolq").rows
    Rows(name='aps/super_glue', config='boolq', split='validation', revision=None)
    """
    for file, names in _files(style).items():
        if name.startswith(tuple(own for own in names if own.endswith("_"))) or name in names:
            for task in _load(file).TASKS:
                if task.name == name:
                    return task
    if name in SUITES:
        members = find_suite(name).tasks
        raise TaskError(
            f"{name} is a suite of {len(members)} tasks, not a task. Ask for all of them and their average by "
            f'`lmeval.suite(lm, "{name}")`, or for one of them by its name, such as "{members[0].name}".'
        )
    raise TaskError(_unknown(f"task {name!r} of style {style!r}", name, sorted(_names(style)), "tasks", name))


def find_suite(name: str, style: str = STYLE) -> Suite:
    """The suite called `name`. Each exists in one style, so that only another one than the default is looked at.

    Raises TaskError where there is none, with the names there are.

    >>> suite = find_suite("superglue")
    >>> len(suite.tasks), str(suite.tasks[0])
    (8, 'boolq')
    """
    _files(style)
    if name in SUITES and style in (STYLE, SUITES[name]):
        suite: Suite = _load(name).SUITE
        return suite
    if name in SUITES:
        raise TaskError(f"the suite {name} has the prompts of {SUITES[name]}, and none of style {style!r}.")
    hint = f' "{name}" is a task: ask for it by `lmeval.task(lm, "{name}")`.' if name in _names(style) else ""
    raise TaskError(_unknown(f"suite {name!r}", name, sorted(SUITES), "suites") + hint)
