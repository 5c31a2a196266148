"""Fine-tuning by one protocol: each kind of answer is learned, shuffled labels are not, a killed one goes on to the same."""

import functools
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from tiny_models import Functional, Stepper, small_transformer
from torch import nn
from torch.nn import functional as F

from pytest_lmeval.data import Rows
from pytest_lmeval.errors import ArgumentError, CorpusError, ProtocolError, SpecError, TaskError
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.models._classifier import HEAD, calls, classifier, last_hidden
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Bytes
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records import load
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import Saver
from pytest_lmeval.scoring._metrics import compute, metrics_of, scored
from pytest_lmeval.tasks import Choices, Generate, Task, find, find_suite
from pytest_lmeval.training._finetune_verb import _task
from pytest_lmeval.training._finetuning import Finetuning, measure_finetune
from pytest_lmeval.training._majority import beside_majority, majority_of
from pytest_lmeval.training._questions import TrainingRow, batches_of, encoded, losses, split, training_rows
from pytest_lmeval.training._weights import copy_of

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


KINDS = {
    "head": (CLASSES, {}, "head on the last token"),
    "verbaliser": (CLASSES, {"classes": "verbaliser"}, "verbaliser"),
    "choice": (CHOICE, {}, "choice by likelihood"),
    "answer": (ANSWER, {"epochs": 8}, "answer tokens"),
}


@pytest.mark.parametrize(("task", "options", "kind"), KINDS.values(), ids=KINDS)
def test_each_kind_of_answer_is_learned_beyond_the_majority_and_chance(task, options, kind):
    result = tuned(task, **options)
    main = task.metrics[0]
    assert result.record.details["kind"] == kind
    assert result.record.settings["kind"] == kind
    assert result.record.notes[0] == f"{kind}, one seed"
    assert result.record.metrics[f"{main}_over_majority"].low > 0.2
    assert result.record.metrics[f"{main}_majority"] < 0.65
    assert result.record.metrics[main] > 0.8


@pytest.mark.parametrize("name", ["head", *(pytest.param(name, marks=pytest.mark.thorough) for name in [*KINDS][1:])])
def test_a_model_with_shuffled_labels_does_not_beat_the_majority(name):
    task, options, _ = KINDS[name]
    result = tuned(task, train=shuffled(LEARN), **options)
    assert result.record.metrics[f"{task.metrics[0]}_over_majority"].low <= 0


# ------------------------------------------------------------------------------------------------------ seeds


@functools.cache
def three_seeds():
    return tuned(seeds=(0, 1, 2), epochs=1)


def test_the_median_and_the_range_over_seeds_are_those_of_their_tasks():
    result = three_seeds()
    reached = [one.result.accuracy for one in result.seeds]
    metrics = result.record.metrics
    assert result.accuracy == sorted(reached)[1]
    assert result.accuracy.interval == next(one for one in reached if one == result.accuracy).interval
    assert (metrics["accuracy_min"], metrics["accuracy_max"]) == (min(reached), max(reached))
    assert result.record.notes[0].endswith(f", median of 3 seeds, accuracy {min(reached):.4g} to {max(reached):.4g}")
    assert len({one.training.settings["key"] for one in result.seeds}) == 3
    assert result.record.series["accuracy"].y == reached
    assert result.record.cost.seconds >= sum(one.training.cost.seconds for one in result.seeds)


def test_the_trained_model_of_the_first_seed_is_one_like_any_other():
    result = three_seeds()
    again = measure_task(result.lm, CLASSES)
    assert again.accuracy == result.seeds[0].result.accuracy
    assert result.lm.classes == ("no", "yes")
    with pytest.raises(TaskError, match=r"is answered by a text, and .* is a classifier, which chooses among \['no', 'yes'\]"):
        measure_task(result.lm, ANSWER)
    with pytest.raises(SpecError, match="it predicts no tokens of"):
        measure_perplexity(result.lm, "automaton:size=1k")


def test_the_given_model_and_the_random_state_do_not_change():
    lm, random_state = byte_model(), torch.get_rng_state()
    before = fingerprint(lm)
    tuned(lm=lm, epochs=1)
    assert fingerprint(lm) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in lm.module.parameters())
    assert not hasattr(lm.module, HEAD)


class Recording(Functional):
    """Records the ids that it, and its copies, are trained on."""

    read = []

    def forward(self, input_ids, state=None):
        if self.training:
            self.read.append(input_ids.clone())
        return super().forward(input_ids, state)


def test_all_models_learn_the_same_questions_in_the_same_order():
    read = []
    for width in (4, 16):
        Recording.read.clear()
        lm = as_model(Recording(vocab=256, width=width))
        Recording.read.clear()
        tuned(lm=lm, epochs=1)
        read.append([*Recording.read])
    assert len(read[0]) == 144 // 8
    assert all(torch.equal(one, other) for one, other in zip(*read, strict=True))


def test_the_weights_with_the_lowest_held_out_loss_are_kept():
    result = tuned(train=shuffled(LEARN), lr=5e-2, epochs=6)
    (seed,) = result.seeds
    held_out = seed.training.series["held_out_loss"]
    best = held_out.y.index(min(held_out.y))
    assert best < len(held_out.y) - 1
    assert held_out.x[best] == 8 * seed.training.details["best_step"]


# --------------------------------------------------------------------------------------------------- the loss


def question_rows(ask, given=LEARN[:12]):
    task = replace(CLASSES, ask=ask, metrics=None)
    return task, training_rows(task, given, None, None)


def by_hand(module, one):
    """The loss of one question, each request read whole and alone."""
    scores = []
    for request in one.requests:
        ids = torch.from_numpy(request.ids)[None]
        logits, _ = module(ids[:, :-1])
        nats = F.cross_entropy(logits[0], ids[0, 1:], reduction="none")[request.context_len - 1 :]
        scores.append(-nats.sum() if len(one.requests) > 1 else -nats.mean())
    if len(scores) == 1:
        return -scores[0]
    return F.cross_entropy(torch.stack(scores)[None], torch.tensor([one.question.answers[0]]))


@pytest.mark.parametrize("ask", [ask_class, ask_choice, ask_answer])
def test_the_loss_of_a_padded_batch_is_that_of_each_question_alone(ask):
    task, given = question_rows(ask)
    lm = byte_model()
    questions = encoded(lm, task, given)
    found = losses(lm, questions)
    alone = torch.stack([by_hand(lm.module, one) for one in questions])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    other = [replace(questions[0], requests=questions[1].requests), *questions[1:]]
    assert not torch.allclose(losses(lm, other), alone)


def test_the_loss_of_an_answer_is_that_of_the_answer_and_of_what_ends_it_alone():
    task, given = question_rows(ask_answer)
    one = encoded(byte_model(), task, given)[0]
    (request,) = one.requests
    answer = bytes(request.ids[request.context_len :].tolist()).decode()
    assert answer.removeprefix("\n") == f" {given[0].question.answers[0]}\n"  # blanks at the end of a prompt are scored with it
    ended = replace(given[0], question=replace(given[0].question, stop=("<end>",)))
    tokenizer = Bytes()
    tokenizer.special = {3: "<end>"}
    (special,) = encoded(replace(byte_model(), tokenizer=tokenizer), task, [ended])
    assert special.requests[0].ids[-1] == 3


def test_a_head_is_the_cross_entropy_of_a_linear_layer_over_the_last_hidden_state():
    task, given = question_rows(ask_class)
    lm = classifier(copy_of(byte_model()), ("no", "yes"), seed=3)
    questions = encoded(lm, task, given)
    head = lm.module.get_submodule(HEAD)
    for one, loss in zip(questions, losses(lm, questions), strict=True):
        hidden, _ = lm.module.cell(lm.module.embed(torch.from_numpy(one.requests[0].read)[None]))
        expected = F.cross_entropy(head(hidden[:, -1]), torch.tensor([one.question.answers[0]]))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


class NoLayers(nn.Module):
    """Its logits come of parameters alone, so nothing takes or gives a hidden state."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids, state=None):
        return self.table[input_ids], input_ids[:, -1:]


def test_the_last_hidden_state_is_found_before_an_output_layer_and_before_a_product_with_the_embeddings():
    with_layer, tied = byte_model(), as_model(small_transformer())
    assert last_hidden(with_layer, calls(with_layer)).name == "head"
    assert last_hidden(with_layer, calls(with_layer)).input
    assert last_hidden(tied, calls(tied)).name == "norm"
    with pytest.raises(SpecError, match=r"nothing to put a head on.*classes='verbaliser'"):
        tuned(lm=as_model(NoLayers()))
    tuned(lm=as_model(NoLayers()), classes="verbaliser", epochs=1)


# ------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("options", [{}, pytest.param({"classes": "verbaliser"}, marks=pytest.mark.thorough)])
def test_adapters_learn_and_the_model_below_them_does_not_change(tmp_path, options):
    pytest.importorskip("peft")
    lm, how = as_model(small_transformer(layers=1)), {"method": "lora", "rank": 4, "folder": tmp_path, "lr": 5e-3, **options}
    result = tuned(lm=lm, **how)
    assert result.accuracy > 0.8
    own = dict(result.lm.module.named_parameters())
    assert torch.equal(own["layers.0.qkv.base_layer.weight"], lm.module.layers[0].qkv.weight)
    assert all(".lora_" in name or name.startswith(HEAD) for name, one in own.items() if one.requires_grad)
    (file,) = tmp_path.glob("models/*/best.safetensors")
    assert file.stat().st_size < sum(p.numel() * 4 for p in own.values()) / 2
    assert tuned(lm=lm, **how).seeds[0].cached
    assert all(parameter.requires_grad for parameter in lm.module.parameters())


# --------------------------------------------------------------------------------------------------- resuming


def outcome(result):
    metrics = [{name: value.to_json() for name, value in one.result.record.metrics.items()} for one in result.seeds]
    return metrics, [one.training.series["learning_curve"].y for one in result.seeds]


RESUMED = {"seeds": (0, 1), "epochs": 1, "train": LEARN[:100]}


def finetuned_until_killed(folder):
    """Die in the middle of the second seed."""

    class Dying:
        def __init__(self, title):
            self.second = "learns" in title and "seed 1" in title

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __call__(self, done, nats, expected):
            if self.second and done == 8 * 5:
                os.kill(os.getpid(), signal.SIGKILL)

    Saver.PAUSE = Saver.SHARE = 0.0
    tuned(folder=Path(folder), bars=lambda title, unit: Dying(title), **RESUMED)


def test_a_killed_fine_tuning_goes_on_to_the_same_result(tmp_path):
    code = "import sys, test_finetuning; test_finetuning.finetuned_until_killed(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    result = tuned(folder=tmp_path, **RESUMED)
    assert [(one.cached, one.resumed_at) for one in result.seeds] == [(True, 0), (False, 5)]
    assert outcome(result) == outcome(tuned(**RESUMED))
    assert outcome(result) != outcome(tuned(**RESUMED | {"lr": 9e-3}))
    assert all(one.cached for one in tuned(folder=tmp_path, **RESUMED).seeds)


# ------------------------------------------------------------------------------------------------------- rows


def numbered(count, groups=None):
    return [TrainingRow(f"{n:016x}", n, Choices("p", ("a", "b"), 0, group=groups and f"g{n % groups}")) for n in range(count)]


def test_the_rows_that_choose_the_weights_are_whole_groups_and_the_same_in_any_order():
    learned, chosen = split(numbered(100), 0.1)
    assert (len(learned), len(chosen)) == (90, 10)
    assert {row.number for row in split(numbered(100)[::-1], 0.1)[1]} == {row.number for row in chosen}
    learned, chosen = split(numbered(100, groups=20), 0.1)
    assert not {row.question.group for row in learned} & {row.question.group for row in chosen}
    assert len(chosen) == 10


def test_each_epoch_has_each_question_once_and_batches_begin_at_any_step():
    every = [batch for batch, _ in zip(batches_of(range(20), 4, seed=1), range(10), strict=False)]
    later = [batch for batch, _ in zip(batches_of(range(20), 4, seed=1, first=7), range(3), strict=False)]
    assert sorted(number for batch in every[:5] for number in batch) == [*range(20)]
    assert every[7:] == later
    assert every[:5] != every[5:]


def test_the_majority_is_compared_question_by_question():
    def example(number, right, chosen):
        nats = tuple(-float(index != chosen) for index in range(2))
        told = {"choices": ("a", "b"), "right": (right,), "loglikelihoods": nats, "chosen": chosen}
        one = Example(id=str(number), number=number, prompt="p", **told)
        return structs.replace(one, scores=scored(one, metrics))

    metrics = metrics_of(["accuracy", "f1"], "task")
    examples = [example(number, int(number < 12), int(number < 16)) for number in range(20)]
    values = compute(metrics, examples)
    found = beside_majority(1, examples, metrics, values)
    assert (found["accuracy_majority"], values["accuracy"]) == (0.6, 0.8)
    assert found["accuracy_over_majority"] == pytest.approx(0.2)
    assert found["accuracy_over_majority"].low < 0.2 < found["accuracy_over_majority"].high
    assert found["f1_over_majority"] == pytest.approx(values["f1"] - found["f1_majority"])
    assert majority_of([TrainingRow("", n, Choices("", ("a", "b"), int(n > 1))) for n in range(5)]) == 1
    assert majority_of([TrainingRow("", n, Generate("", ("x", "y")[n > 0 :])) for n in range(3)]) == "y"


def test_the_benchmarks_have_rows_to_learn_from_and_their_own_metrics():
    suites = [task for name in ("glue", "superglue") for task in find_suite(name).tasks]
    for task in (*suites, find("squad"), _task("mmlu")):
        source = task.shots if task.train is None else task.train
        assert isinstance(source, Rows)
        assert source != task.rows
    assert find("cola").metrics == ("matthews",)
    assert find("multirc").metrics == ("accuracy", "f1", "question_exact_match")
    assert find("squad").metrics == ("squad_f1", "exact_match")
    assert (_task("mmlu").train.split, _task("mmlu").classes) == ("auxiliary_train", False)


# ------------------------------------------------------------------------------------------------------ refused

NO_LABEL = [{"text": "1 good", "other": "bad"}]
REFUSED = {
    "missing label": (
        {"train": [*LEARN[:3], *NO_LABEL]},
        TaskError,
        "mood, training row 3 cannot be asked: it has no field 'label'",
    ),
    "missing label of the test": (
        {"task": replace(CLASSES, rows=[*TEST[:3], *NO_LABEL])},
        TaskError,
        "mood, row 3 cannot be asked",
    ),
    "hidden label": ({"train": [{**LEARN[0], "label": -1}]}, TaskError, "mood, training row 0: the label is -1, .*hidden ones"),
    "label as text": ({"train": [{**LEARN[0], "label": "1"}]}, TaskError, r"label is '1'.*write int\(\.\.\.\)"),
    "one label": (
        {"train": [row for row in LEARN if row["label"]]},
        TaskError,
        "training rows have the label 'yes'.*nothing to tell",
    ),
    "no rows": ({"task": Task("mood", TEST, ask_class)}, TaskError, r"no rows to train on.*train=ROWS"),
    "an iterator": ({"train": iter(LEARN)}, TaskError, "mood: train is .*It can be read once"),
    "no such file": ({"train": "jsonl:nowhere.jsonl"}, CorpusError, "nowhere.jsonl"),
    "no questions": ({"task": replace(CLASSES, ask=lambda row: None)}, TaskError, "none of its training rows is a question"),
    "too few rows": ({"train": LEARN[:8]}, TaskError, "8 training questions, of which 1 choose the weights, and a batch has 8"),
    "the test": ({"train": [*LEARN, *TEST]}, TaskError, "all 60 questions of mood stand in its training rows"),
    "no answer": (
        {"task": replace(ANSWER, rows=lambda: TEST, ask=lambda row: Generate("q", ()))},
        TaskError,
        r"row 0: it has no right answer \(answers=\(\)",
    ),
    "classes of words": (
        {"task": ANSWER, "classes": "head"},
        TaskError,
        "has answers in words, and classes='head' is for choices",
    ),
    "classes of choices": (
        {"task": CHOICE, "classes": "head"},
        TaskError,
        r"has no classes: .* \(row \d+ has others than the first\)",
    ),
    "too long": ({"task": CHOICE, "seq_len": 3}, TaskError, r"praise\[train\], row 0 .* is \d+ tokens; .* reads 3"),
    "no seeds": ({"seeds": ()}, ArgumentError, r"the seeds are \[\]: at least one"),
    "equal seeds": ({"seeds": (1, 1)}, ArgumentError, "at least one, different"),
    "seed": ({"seed": 3}, ProtocolError, "a fine-tuning has no setting seed.*It has seeds"),
    "tokens": ({"tokens": 3}, ProtocolError, "no setting tokens: it learns from questions"),
    "unknown setting": ({"learning_rate": 3}, ProtocolError, "no setting learning_rate"),
    "unknown method": ({"method": "qlora"}, ArgumentError, "method='qlora'; method is 'full' or 'lora'"),
    "unknown classes": ({"classes": "heads"}, ArgumentError, "classes='heads'; classes is None or 'head' or 'verbaliser'"),
    "rank": ({"rank": 0}, ArgumentError, "rank=0; the rank of an adapter"),
    "nothing held out": ({"held_out": 0}, ArgumentError, "held_out=0; it is a share of the training rows"),
    "train_limit": ({"train_limit": 0}, ArgumentError, "train_limit=0"),
    "no module": ({"lm": as_model(Stepper())}, SpecError, "is no torch module"),
    "no linear layer": ({"method": "lora"}, SpecError, "calls no linear layer .*method='full'"),
    "16 bits": ({"lm": as_model(Functional(vocab=256).bfloat16())}, SpecError, "Load it with @fp32"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fine_tuned_is_refused_before_it_is_trained(options, error, message):
    options = dict(options)
    with pytest.raises(error, match=message):
        tuned(options.pop("task", CLASSES), **options)


def test_a_suite_of_tasks_that_are_learned_apart_is_refused_with_their_names():
    with pytest.raises(TaskError, match="glue is a suite of 8 tasks, and a model is fine-tuned on one: cola, sst2"):
        _task("glue")
    with pytest.raises(ArgumentError, match="a task is a Task, or the name of one; got 3"):
        _task(3)


def test_questions_that_are_learned_too_and_cut_ones_are_counted():
    result = tuned(train=[*LEARN, *TEST[:5]], seq_len=8, epochs=1)
    assert "5 of 60 questions stand in the training rows, too" in result.record.notes
    assert any(note.endswith("training questions truncated") for note in result.record.notes)
    assert math.isfinite(result.accuracy)
    assert np.isfinite(result.record.series["learning_curve"].y).all()


# ---------------------------------------------------------------------------------------------------- the verb

OWN = """
    import random
    from pytest_lmeval import Choices, Task

    def rows(count, seed):
        drawn = random.Random(seed)
        return [{"n": seed * 1000 + n, "label": drawn.randrange(2)} for n in range(count)]

    def ask(row):
        return Choices(f"{row['n']} {'abcd'[2 * row['label']]}", ("no", "yes"), row["label"])

    TASK = Task("letters", rows(20, 1), ask, train=rows(40, 2))

    def test_learns(lmeval, lm):
        result = lmeval.finetune(lm, TASK, seeds=2, lr=1e-2, batch_size=4, epochs=2)
        assert lmeval.task(result.lm, TASK).accuracy == result.seeds[0].result.accuracy

    def test_refused(lmeval, lm):
        lmeval.finetune(lm, "glue")
"""


def test_models_are_fine_tuned_side_by_side_once_and_recorded(project):
    project.makepyfile(test_own=OWN)
    options = ("-p", "no:cacheprovider", "--lm", "tiny:Tiny", "--lm", "tiny:Other")
    result = project.runpytest_subprocess(*options)
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        ["*glue is a suite of 8 tasks*", "finetune, letters, fine-tuned", "*tiny:Tiny fine-tuned*", "*tiny:Other*"]
    )
    assert "site-packages" not in result.stdout.str()
    document = load(project.path / ".lmeval" / "metrics.json")
    records = [record for record in document.records if record.kind == "finetune"]
    assert {record.lm.spec for record in records} == {"tiny:Tiny fine-tuned", "tiny:Other fine-tuned"}
    for record in records:
        assert {"accuracy", "accuracy_min", "accuracy_max", "accuracy_majority", "accuracy_over_majority"} <= set(
            record.metrics
        )
        assert len((project.path / ".lmeval" / record.examples).read_text().splitlines()) == 20
        assert record.settings["seeds"] == [0, 1]
        assert record.certificate is not None
    again = project.runpytest_subprocess(*options, "-k", "learns")
    again.stdout.fnmatch_lines(["*tiny:Tiny on letters: fine-tuned before with the seeds 0, 1*"])
