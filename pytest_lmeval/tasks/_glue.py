"""GLUE (Wang et al. 2018, arXiv:1804.07461): sentences and pairs of sentences, each with a label. Prompts of lm_eval.

Labels of the test split are hidden (-1), so questions come from the validation split, few-shot examples from the training one.
"""

from __future__ import annotations

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.tasks import Ask, Choices, Suite, Task, by_name, id_of


def cola(row: Row) -> Choices:
    """Is this grammatical English? (Warstadt et al. 2019)"""
    return Choices(f"{row['sentence']}\nQuestion: Does this sentence make sense?\nAnswer:", (" no", " yes"), row["label"])


def sst2(row: Row) -> Choices:
    """Does a film critic like it? (Socher et al. 2013)"""
    prompt = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return Choices(prompt, (" negative", " positive"), row["label"])


def mrpc(row: Row) -> Choices:
    """Do two sentences of the news mean the same? (Dolan and Brockett 2005)"""
    pair = f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}"
    return Choices(f"{pair}\nQuestion: Do both sentences mean the same thing?\nAnswer:", (" no", " yes"), row["label"])


def qqp(row: Row) -> Choices:
    """Are two questions of Quora the same question?"""
    pair = f"Question 1: {row['question1']}\nQuestion 2: {row['question2']}"
    return Choices(f"{pair}\nQuestion: Do both questions ask the same thing?\nAnswer:", (" no", " yes"), row["label"])


def mnli(row: Row) -> Choices:
    """Does one sentence follow from another? (Williams et al. 2018)"""
    hypothesis = row["hypothesis"].strip()
    statement = hypothesis if hypothesis.endswith(".") else f"{hypothesis}."
    prompt = f"{row['premise']}\nQuestion: {statement} True, False or Neither?\nAnswer:"
    return Choices(prompt, (" True", " Neither", " False"), row["label"], group=id_of({"premise": row["premise"]}))


def qnli(row: Row) -> Choices:
    """Does a sentence of an article answer a question about it? (from SQuAD, Rajpurkar et al. 2016)"""
    prompt = f"{row['question']}\n{row['sentence']}\nQuestion: Does this response answer the question?\nAnswer:"
    return Choices(prompt, (" yes", " no"), row["label"], group=id_of({"sentence": row["sentence"]}))


def rte(row: Row) -> Choices:
    """Does a sentence follow from a passage? Label 0 is yes. (Dagan et al. 2005, and the challenges after it)"""
    prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
    return Choices(prompt, (" True", " False"), row["label"])


def wnli(row: Row) -> Choices:
    """Does a sentence with its pronoun replaced follow? Label 1 is yes. (Levesque et al. 2011)"""
    prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
    return Choices(prompt, (" False", " True"), row["label"])


def _task(name: str, ask: Ask, *metrics: str, config: str = "", split: str = "validation") -> Task:
    rows = Rows("nyu-mll/glue", config or name, split)
    return Task(name, rows, ask, metrics or ("accuracy",), shots=rows.of("train"), style="lm_eval")


SUITE = Suite(
    "glue",
    (
        _task("cola", cola, "matthews"),
        _task("sst2", sst2),
        _task("mrpc", mrpc, "accuracy", "f1"),
        _task("qqp", qqp, "accuracy", "f1"),
        _task("mnli", mnli, split="validation_matched"),
        _task("qnli", qnli),
        _task("rte", rte),
        _task("wnli", wnli),
    ),
)
# The same questions about genres that are not in the training split: reported beside mnli, no part of the average.
MISMATCHED = _task("mnli_mismatch", mnli, config="mnli", split="validation_mismatched")
REGISTERED = by_name(SUITE, *SUITE.tasks, MISMATCHED)
