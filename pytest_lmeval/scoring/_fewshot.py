"""Choose the few-shot examples of each question; none is shown itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pytest_lmeval.data._formats import Row
from pytest_lmeval.data._rows import Rows
from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks._questions import AnyQuestion, Choices, Generate, Question, Requests
from pytest_lmeval.tasks._rows import guarded, id_of
from pytest_lmeval.tasks._task import Task

Fewshot = Literal["document", "lm_eval"]
POOL = 1000  # rows to draw from: the first of their split, so that a large one is not read whole
LM_EVAL_SEED = 1234


def rows_of(source: Any, data_dir: str | Path | None = None, word: str = "row") -> Iterator[tuple[str, Row]]:
    """The rows of a dataset, a list, or a function, each with the words that name it: "row 3 (questions.jsonl, line 4)"."""
    if isinstance(source, Rows):
        for number, (place, row) in enumerate(source.placed(data_dir)):
            yield f"{word} {number} ({place})", row
        return
    for number, row in enumerate(source() if callable(source) else source):
        yield f"{word} {number}", row


def identity_of(task: Task, row: Row, where: str) -> str:
    """The id of a row (see `tasks.id_of`). Raises TaskError with the row for one that has none."""
    try:
        return id_of(row)
    except TaskError as error:
        raise TaskError(f"{task}, {where}: {error}") from None


def question_of(task: Task, row: Row, where: str) -> AnyQuestion | None:
    """The question that `ask` makes of a row. Raises TaskError with the row for a missing field and any other failure."""
    try:
        question = task.ask(guarded(row))
    except TaskError as error:
        raise TaskError(f"{task}, {where}: {error}") from None
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyError):  # rows of a dataset have no field where its value is null
            of_dataset = isinstance(task.rows, Rows) or isinstance(task.shots, Rows)
            why = f"the field {error} is missing or null" if of_dataset else f"it has no field {error}"
        shown = ", ".join(f"{name}={str(value)[:40]!r}" for name, value in row.items()) if isinstance(row, dict) else repr(row)
        raise TaskError(f"{task}, {where} cannot be asked: {why}. The row is {shown[:500]}.") from error
    if question is not None and not isinstance(question, Choices | Generate | Requests):
        raise TaskError(
            f"{task}, {where}: `ask` returned {repr(question)[:80]}, of type {type(question).__name__}. It returns Choices or "
            "Generate, or None for a row that is no question."
        )
    return question


class Shots:
    """Draws `count` few-shot examples for each question.

    how  "document": by the hash of the question's row, from the first thousand rows, whatever the other questions are;
         "lm_eval": as lm-evaluation-harness, question after question from the whole split, so that their order counts.
         A task that shows the first examples (MMLU) shows those either way.

    Rows that are no questions are skipped. Raises TaskError for fewer than `count` examples, and one that cannot be asked.
    """

    def __init__(self, task: Task, count: int, how: Fewshot, *, data_dir: str | Path | None = None, seed: int = 0) -> None:
        if count < 0 or how not in ("document", "lm_eval"):
            raise TaskError(f"shots={count}, fewshot={how!r}: shots are 0 or more, drawn by 'document' or as 'lm_eval' does.")
        self.task, self.count, self.seed = task, count, seed
        self.strategy = "first" if task.fewshot_strategy == "first" else how
        # lm_eval draws one more for questions of a split not called a test split, in case one draws itself
        self.spare = not isinstance(task.rows, Rows) or not task.rows.split.startswith("test")
        pool = self._pool(data_dir) if count else []
        self.pool = [row for _, row in pool]
        self.ids = [] if self.strategy == "lm_eval" else [identity_of(task, row, where) for where, row in pool]
        self.random = random.Random(LM_EVAL_SEED)

    def _pool(self, data_dir: str | Path | None) -> list[tuple[str, Row]]:
        rows = rows_of(self.task.shots, data_dir, "example")
        questions = ((where, row) for where, row in rows if question_of(self.task, row, where) is not None)
        pool = list(islice(questions, {"first": self.count + 1, "document": POOL, "lm_eval": None}[self.strategy]))
        spare = self.strategy == "lm_eval" and self.spare
        if len(pool) < self.count + spare:
            more = ", of which lm_eval draws one more, in case a question draws itself" if spare else ""
            what = f"{len(pool)}{more}. Ask it with fewer shots." if pool else "none. Ask it with shots=0."
            raise TaskError(f"{self.task} is to be shown {self.count} example(s), and its rows for that are {what}")
        return pool

    def questions(self, row: Row, own: str) -> list[Question]:
        """The few-shot examples before the question of `row`, whose id is `own`."""
        questions = (question_of(self.task, shot, f"example {id_of(shot)}") for shot in self.rows(row, own))
        return [shot for shot in questions if isinstance(shot, Choices | Generate)]

    def pass_over(self, row: Row, own: str) -> None:
        """Draw for a question that is not asked here, if those after it depend on what was drawn before."""
        if self.strategy == "lm_eval":
            self.rows(row, own)

    def rows(self, row: Row, own: str) -> list[Row]:
        """The examples of `row`, whose id is `own`."""
        if not self.count:
            return []
        if self.strategy == "lm_eval":
            drawn = self.random.sample(self.pool, self.count + self.spare)
            others = [shot for shot in drawn if not self.spare or id_of(shot) != own]
            if len(others) >= self.count:
                return others[: self.count]
            rest = [shot for shot in self.pool if id_of(shot) != own]
            return self.random.sample(rest, len(self._enough(rest, own)))
        indices = list(range(len(self.pool)))
        if self.strategy == "document":
            random.Random(f"{self.seed}/{own}").shuffle(indices)
        return self._enough([self.pool[index] for index in indices if self.ids[index] != own], own)

    def _enough(self, others: list[Row], own: str) -> list[Row]:
        if len(others) < self.count:
            raise TaskError(
                f"{self.task}: there are {len(others)} examples beside row {own} itself, and {self.count} are wanted."
            )
        return others[: self.count]
