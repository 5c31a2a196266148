"""Fine-tune each model on a task by one protocol: the same questions, order, optimizer, schedule and seeds, side by side.

    pytest benchmarks/test_finetuning.py --lm zoo:mamba --lm zoo:causal-bk
    pytest benchmarks/test_finetuning.py --lm zoo:mamba --lm hf:./my-checkpoint -k "rte or copa" --lmeval-data MIRROR

`negation` needs no download; the others are skipped where their rows are not found. A fine-tuned model is not trained again.
"""

import itertools
import random

import pytest

from pytest_lmeval import Choices, CorpusError, Task
from pytest_lmeval.tasks import find_suite

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

NAMES = [str(task) for suite in ("glue", "superglue") for task in find_suite(suite).tasks]
SETTINGS = {"seeds": 5, "lr": 1e-3, "epochs": 3, "train_limit": 5_000}


def sentences():
    """Verdicts, each with a label that a word and a negation before it tell; the same in every run."""
    things = ("film", "book", "play", "song", "meal", "trip", "game", "story", "talk", "walk", "house", "wine")
    words = {1: ("good", "fine", "great", "superb", "lovely"), 0: ("bad", "poor", "awful", "dull", "dreadful")}
    ways = list(itertools.product(things, ("was", "is", "seemed"), ("", "not ", "very ", "not very "), (0, 1), range(5)))
    random.Random(0).shuffle(ways)
    return [
        {"text": f"The {thing} {verb} {before}{words[good][n]}.", "label": good ^ before.startswith("not")}
        for thing, verb, before, good, n in ways
    ]


def ask(row):
    return Choices(f"{row['text']}\nIs that praise?", (" no", " yes"), row["label"])


ROWS = sentences()
NEGATION = Task("negation", ROWS[:300], ask, ("accuracy", "matthews"), train=ROWS[300:])


@pytest.mark.parametrize("name", ["negation", *NAMES, "squad", "mmlu"])
def test_fine_tuned(lmeval, lm, name):
    try:
        result = lmeval.finetune(lm, NEGATION if name == "negation" else name, **SETTINGS)
    except CorpusError as error:
        pytest.skip(str(error))
    metric = next(iter(result.record.metrics))
    assert result.record.metrics[f"{metric}_over_majority"] > -0.1
