"""Examples that are shown before a question.

Each question draws its own by the hash of its row: whatever is asked before it, beside it or on another machine, it is shown
the same ones. It is never shown itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pytest_lmeval.data._rows import Row, Rows
from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks._questions import Choices, Generate, Question, Task, id_of

Fewshot = Literal["document", "lm_eval"]
POOL = 1000  # rows that examples are drawn from: the first of their split, so that a large one is not read whole
LM_EVAL_SEED = 1234


def rows_of(source: Any, data_dir: str | Path | None = None) -> Iterator[Row]:
    """The rows that a task names: of a dataset, a list, or a function."""
    if isinstance(source, Rows):
        return source.read(data_dir)
    found: Iterable[Row] = source() if callable(source) else source
    return iter(found)


def question_of(task: Task, row: Row, place: str) -> Question | None:
    """How a row reads. Raises TaskError with the row for a field that is missing, and for whatever else it cannot say."""
    try:
        question = task.ask(row)
    except TaskError as error:
        raise TaskError(f"{task}, {place}: {error}") from None
    except Exception as error:
        why = _missing(task, error) if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        there = ", ".join(f"{name}={str(value)[:40]!r}" for name, value in row.items()) if isinstance(row, dict) else repr(row)
        raise TaskError(f"{task}, {place} cannot be asked: {why}. The row is {there[:500]}.") from error
    if question is not None and not isinstance(question, Choices | Generate):
        raise TaskError(
            f"{task}, {place}: `ask` returned {repr(question)[:80]}, of type {type(question).__name__}. It returns Choices or "
            "Generate, or None for a row that is no question."
        )
    return question


def _missing(task: Task, field: KeyError) -> str:
    if isinstance(task.rows, Rows) or isinstance(task.shots, Rows):  # whose rows have no field for what is null
        return f"the field {field} is missing or null"
    return f"it has no field {field}"


class Shots:
    """What each question is shown: `count` examples.

    how   "document": drawn by the row's own hash, from the first thousand. "lm_eval": drawn as lm-evaluation-harness draws
          them, one question after the other from the whole split, so that its numbers can be had again; they depend on the
          order and on where one begins. A task that takes the first ones (MMLU) takes those either way.

    Rows that are no questions are no examples: wherever rows are counted here, they are not. Raises TaskError where there are
    fewer than `count` examples, and for one that cannot be asked.
    """

    def __init__(self, task: Task, count: int, how: Fewshot, *, data_dir: str | Path | None = None, seed: int = 0) -> None:
        if count < 0 or how not in ("document", "lm_eval"):
            raise TaskError(f"shots={count}, fewshot={how!r}: shots are 0 or more, drawn by 'document' or as 'lm_eval' does.")
        self.task, self.count, self.seed = task, count, seed
        self.strategy = "first" if task.fewshot_strategy == "first" else how
        # there, questions of a split that is not called a test split draw one more, in case they draw themselves
        self.spare = not isinstance(task.rows, Rows) or not task.rows.split.startswith("test")
        self.pool = self._pool(data_dir) if count else []
        self.ids = [] if self.strategy == "lm_eval" else [id_of(row) for row in self.pool]
        self.random = random.Random(LM_EVAL_SEED)

    def _pool(self, data_dir: str | Path | None) -> list[Row]:
        """The rows that examples are taken from: those that are questions."""
        rows = enumerate(rows_of(self.task.shots, data_dir))
        questions = (row for number, row in rows if question_of(self.task, row, f"example {number}") is not None)
        pool = list(islice(questions, {"first": self.count + 1, "document": POOL, "lm_eval": None}[self.strategy]))
        spare = self.strategy == "lm_eval" and self.spare
        if len(pool) < self.count + spare:
            raise TaskError(
                f"{self.task} is to be shown {self.count} example(s), and its rows for that are {len(pool)}"
                + (", of which lm_eval draws one more, in case a question draws itself" if spare and pool else "")
                + (". Ask it with fewer shots." if pool else ": none. Ask it with shots=0.")
            )
        return pool

    def of(self, row: Row, own: str) -> str:
        """The text before the question of `row`, whose hash is `own`: description and examples."""
        return self.task.description + "".join(self._shown(shot) for shot in self._rows(row, own))

    def _shown(self, shot: Row) -> str:
        question = question_of(self.task, shot, f"example {id_of(shot)}")
        assert question is not None  # the pool has questions alone
        return question.prompt + question.target + self.task.fewshot_delimiter

    def _rows(self, row: Row, own: str) -> list[Row]:
        if not self.count:
            return []
        if self.strategy == "lm_eval":
            return self._as_lm_eval(row, own)
        places = list(range(len(self.pool)))
        if self.strategy == "document":
            random.Random(f"{self.seed}/{own}").shuffle(places)
        return self._enough([self.pool[place] for place in places if self.ids[place] != own], own)

    def _as_lm_eval(self, row: Row, own: str) -> list[Row]:
        drawn = self.random.sample(self.pool, self.count + self.spare)
        others = [shot for shot in drawn if not self.spare or shot != row][: self.count]
        if len(others) == self.count:
            return others
        rest = [shot for shot in self.pool if shot != row]
        return self.random.sample(rest, len(self._enough(rest, own)))

    def _enough(self, others: list[Row], own: str) -> list[Row]:
        if len(others) < self.count:
            raise TaskError(
                f"{self.task}: there are {len(others)} examples beside row {own} itself, and {self.count} were asked for."
            )
        return others[: self.count]
