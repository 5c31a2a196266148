"""`lmeval run`: ask models tasks by name, without a file of tests.

    lmeval run --lm hf:FOLDER --tasks boolq,lm_eval:gsm8k --limit 200

The run is one of pytest, a test for each model and task: with its journal, reports, and all options, which follow `--`:

    lmeval run --tasks boolq -- --lmeval-data mirror --lmeval-baseline baseline.json -n 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_lmeval import tasks
from pytest_lmeval.errors import LmevalError, UsageError
from pytest_lmeval.records._replacing import replacing

FILE = Path(".lmeval", "run", "test_run.py")
CODE = '''"""Asks what `lmeval run` was told."""

from pytest_lmeval._asking import pytest_generate_tests, test_answers  # noqa: F401
'''
TASKS, SHOTS = "LMEVAL_RUN_TASKS", "LMEVAL_RUN_SHOTS"  # in the environment, which workers of xdist have too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lm", action="append", default=[], help="a spec of a model (repeatable); default: demo")
    parser.add_argument("--tasks", required=True, help="names of tasks and suites, with commas between them")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--shots", type=int, help="few-shot examples; default: as many as a task of lm_eval says, else none")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")


def main(options: argparse.Namespace) -> int:
    """Run pytest on a test for each task. Raises UsageError for no task; returns pytest's exit status."""
    names = [name for name in map(str.strip, options.tasks.split(",")) if name]
    if not names:
        raise UsageError(f"--tasks {options.tasks!r} names no task. `lmeval list tasks` lists them.")
    given = [part for spec in options.lm for part in ("--lm", spec)]
    given += [] if options.limit is None else ["--lmeval-limit", str(options.limit)]
    asked = {TASKS: json.dumps(names), SHOTS: json.dumps(options.shots)}
    with replacing(FILE) as new:  # below the working folder, so that its ini file and its conftest.py count
        new.write_text(CODE)
    return subprocess.call(
        [sys.executable, "-m", "pytest", "--tb=short", "--show-capture=no", str(FILE), *given, *options.pytest],
        env=os.environ | asked,
    )


def pytest_generate_tests(metafunc: Any) -> None:
    """A test for each name."""
    metafunc.parametrize("asked", json.loads(os.environ[TASKS]))


def test_answers(lmeval: Any, lm: Any, asked: str) -> None:
    """A suite is asked task by task. What fails says so in words, without a traceback."""
    try:
        verb = lmeval.suite if isinstance(tasks._registered(asked), tasks.Suite) else lmeval.task
        verb(lm, asked, json.loads(os.environ[SHOTS]))
    except LmevalError as error:
        message = str(error)
    else:
        return
    pytest.fail(message, pytrace=False)
