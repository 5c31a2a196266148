"""Tasks that a small model learns in a second: a class, a choice and an answer in words."""

import random
from dataclasses import replace

from tiny_models import Functional

from pytest_lmeval.models._sources import as_model
from pytest_lmeval.tasks import Choices, Generate, Task
from pytest_lmeval.training._finetuning import Finetuning, measure_finetune

GOOD, BAD = ("good", "fine", "great", "superb"), ("bad", "poor", "awful", "dull")
FAST = {"lr": 1e-2, "batch_size": 8, "epochs": 5, "seq_len": 64}


def rows(count, seed):
    """Sentences with a label that a word tells."""
    drawn = random.Random(seed)
    return [
        {"text": f"{number} {drawn.choice((BAD, GOOD)[label])}", "label": label, "other": drawn.choice((GOOD, BAD)[label])}
        for number in range(1000 * seed, 1000 * seed + count)
        for label in [drawn.randrange(2)]
    ]


def ask_class(row):
    return Choices(f"{row['text']}\n", ("no", "yes"), row["label"])


def ask_choice(row):
    """Which of two words is praise? They are others in each row."""
    return Choices(f"{row['text'].split()[0]} was", (f" {row['other']}", f" {row['text'].split()[1]}"), row["label"])


def ask_answer(row):
    return Generate(f"{row['text']}\n", (("bad", "good")[row["label"]],), max_tokens=8)


LEARN, TEST = rows(160, 1), rows(60, 2)
CLASSES = Task("mood", TEST, ask_class, ("accuracy",), train=LEARN)
CHOICE = replace(CLASSES, name="praise", ask=ask_choice, metrics=("accuracy",))
ANSWER = replace(CLASSES, name="word", ask=ask_answer, metrics=("exact_match", "squad_f1"))


def byte_model(**options):
    return as_model(Functional(**{"vocab": 256, "width": 24, **options}))


def tuned(task=CLASSES, lm=None, seeds=(0,), train=None, folder=None, **options):
    own = {name: options.pop(name) for name in [*options] if name in Finetuning.__dataclass_fields__}
    measured = {name: options.pop(name) for name in [*options] if name in ("limit", "bars", "fresh", "examples", "kept")}
    how = Finetuning({**FAST, **options}, seeds, **own)
    return measure_finetune(lm or byte_model(), task, how, train=train, folder=folder, **measured)


def shuffled(given, seed=0):
    labels = [row["label"] for row in given]
    random.Random(seed).shuffle(labels)
    return [{**row, "label": label} for row, label in zip(given, labels, strict=True)]
