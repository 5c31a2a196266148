"""ARC (Clark et al. 2018, arXiv:1803.05457): science questions from school examinations. Prompts of lm_eval.

The challenge set holds those that neither retrieval nor word co-occurrence answered. Some have three or five choices.
"""

from __future__ import annotations

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.tasks import Choices, Suite, Task, by_name
from pytest_lmeval.tasks._checks import texts


def arc(row: Row) -> Choices:
    """Choices are labelled A to E, or 1 to 4; the key is a label."""
    answer = row["choices"]["label"].index(row["answerKey"])
    return Choices(
        f"Question: {row['question']}\nAnswer:", tuple(f" {text}" for text in texts("choices", row["choices"]["text"])), answer
    )


def _task(name: str, config: str) -> Task:
    rows = Rows("allenai/ai2_arc", config, "test")
    return Task(name, rows, arc, ("accuracy", "accuracy_per_character"), shots=rows.of("train"), style="lm_eval")


SUITE = Suite("arc", (_task("arc_easy", "ARC-Easy"), _task("arc_challenge", "ARC-Challenge")))
REGISTERED = by_name(SUITE, *SUITE.tasks)
