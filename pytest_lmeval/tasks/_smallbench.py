"""SmallBench: four tasks for small models, with short prompts of their own: `smallbench:sst2` and so on.

accuracy_per_token comes first. SmallBench takes 500, 277, 500 and 408 rows, shuffled with seed 42; here rows keep their order.
"""

from __future__ import annotations

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.tasks import Ask, Choices, Suite, Task, by_name, id_of


def sst2(row: Row) -> Choices:
    """Label 1 is positive."""
    return Choices(f"Sentence: {row['sentence']}\nSentiment:", (" negative", " positive"), row["label"])


def rte(row: Row) -> Choices:
    """Label 0 is entailment."""
    prompt = f"Premise: {row['sentence1']}\nHypothesis: {row['sentence2']}\nRelation:"
    return Choices(prompt, (" entailment", " not entailment"), row["label"])


def boolq(row: Row) -> Choices:
    """Label 1 is yes."""
    prompt = f"Passage: {row['passage']}\nQuestion: {row['question']}\nAnswer:"
    return Choices(prompt, (" no", " yes"), row["label"], group=id_of({"passage": row["passage"]}))


def mrpc(row: Row) -> Choices:
    """Label 1 is yes."""
    prompt = f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\nParaphrase:"
    return Choices(prompt, (" no", " yes"), row["label"])


def _task(name: str, ask: Ask, dataset: str) -> Task:
    rows = Rows(dataset, name, "validation")
    return Task(f"smallbench:{name}", rows, ask, ("accuracy_per_token", "accuracy"), shots=rows.of("train"), style="smallbench")


GLUE, SUPERGLUE = "nyu-mll/glue", "aps/super_glue"
SUITE = Suite(
    "smallbench",
    (_task("sst2", sst2, GLUE), _task("rte", rte, GLUE), _task("boolq", boolq, SUPERGLUE), _task("mrpc", mrpc, GLUE)),
)
REGISTERED = by_name(SUITE, *SUITE.tasks)
