"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): how does it go on? Prompts of lm_eval.

The wrong endings were written by a language model, and chosen to fool other models. Endings differ much in length, so that
accuracy_per_character is the number that is usually quoted.
"""

from __future__ import annotations

import re

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.tasks import Choices, Task, by_name


def hellaswag(row: Row) -> Choices:
    """The label is a text, and an empty one in the test split, where it is hidden."""
    scene = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    label = -1 if row["label"] == "" else int(row["label"])
    return Choices(_clean(scene), tuple(f" {_clean(ending)}" for ending in row["endings"]), label)


def _clean(text: str) -> str:
    """Without the marks that WikiHow's headings left in brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


ROWS = Rows("Rowan/hellaswag", split="validation")
METRICS = ("accuracy", "accuracy_per_character")
TASK = Task("hellaswag", ROWS, hellaswag, METRICS, shots=ROWS.of("train"), style="lm_eval")
REGISTERED = by_name(TASK)
