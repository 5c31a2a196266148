"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which ending continues a text? Prompts of lm_eval.

Wrong endings are a language model's, filtered to fool others. Lengths differ, so accuracy_per_character is usually quoted.
"""

from __future__ import annotations

import re

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.tasks import Choices, Task, by_name
from pytest_lmeval.tasks._checks import texts


def hellaswag(row: Row) -> Choices:
    """The label is a text; empty in the test split, where it is hidden."""
    scene = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    label = -1 if row["label"] == "" else int(row["label"])
    return Choices(_clean(scene), tuple(f" {_clean(ending)}" for ending in texts("endings", row["endings"])), label)


def _clean(text: str) -> str:
    """The text without the bracketed marks that WikiHow's headings left."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


ROWS = Rows("Rowan/hellaswag", split="validation")
METRICS = ("accuracy", "accuracy_per_character")
REGISTERED = by_name(Task("hellaswag", ROWS, hellaswag, METRICS, shots=ROWS.of("train"), style="lm_eval"))
