"""PIQA (Bisk et al. 2020, arXiv:1911.11641): which of two ways of doing something works? Prompts of lm_eval."""

from __future__ import annotations

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.tasks import Choices, Task, by_name


def piqa(row: Row) -> Choices:
    """The two solutions often differ in a single word."""
    return Choices(f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), row["label"])


ROWS = Rows("baber/piqa", split="validation")
METRICS = ("accuracy", "accuracy_per_character")
REGISTERED = by_name(Task("piqa", ROWS, piqa, METRICS, shots=ROWS.of("train"), style="lm_eval"))
