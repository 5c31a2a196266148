"""SQuAD 1.1 (Rajpurkar et al. 2016, arXiv:1606.05250) and 2.0 (2018, arXiv:1806.03822): generated answers.

Several people marked the answer in the paragraph: any is right. The prompt is that of lm_eval's squadv2, also for SQuAD 1.1,
which lm_eval 0.4.13 does not have.
"""

from __future__ import annotations

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks import Generate, Task, by_name, id_of
from pytest_lmeval.tasks._checks import texts

UNANSWERABLE = "unanswerable"  # the answer of few-shot examples where the paragraph does not tell it


def _prompt(row: Row) -> str:
    return f"Title: {row['title']}\n\nBackground: {row['context']}\n\nQuestion: {row['question']}\n\nAnswer:"


def squad(row: Row) -> Generate:
    """Every question has an answer in the paragraph."""
    answers = texts("answers", row["answers"]["text"])
    if not answers:
        raise TaskError("there is no answer, and SQuAD 1.1 always has one. Rows of 2.0 are asked by the task squadv2.")
    return Generate(_prompt(row), answers, group=id_of({"context": row["context"]}))


def squadv2(row: Row) -> Generate:
    """Half of the questions have no answer in the paragraph: "unanswerable" or an empty output is right then.

    lm_eval 0.4.13 shows "unanswerable" in its few-shot examples but counts it as wrong, and only an empty output as right.
    """
    answers = texts("answers", row["answers"]["text"]) or (UNANSWERABLE, "")
    return Generate(_prompt(row), answers, group=id_of({"context": row["context"]}))


SQUAD = Rows("rajpurkar/squad", split="validation")
SQUADV2 = Rows("lighteval/squad_v2", split="validation")
ANSWERED = ("has_answer_exact_match", "has_answer_f1", "no_answer_accuracy")
REGISTERED = by_name(
    Task("squad", SQUAD, squad, ("squad_f1", "exact_match"), shots=SQUAD.of("train")),
    Task("squadv2", SQUADV2, squadv2, ("squad_f1", "exact_match", *ANSWERED), shots=SQUADV2.of("train"), style="lm_eval"),
)
