"""Try the loss of each question that a model is fine-tuned on, the split of the rows, and the errors of wrong ones."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetuning_tasks import ANSWER, CHOICE, CLASSES, LEARN, TEST, ask_answer, ask_choice, ask_class, byte_model, tuned
from msgspec import structs
from tiny_models import Functional, Stepper, small_transformer
from torch import nn
from torch.nn import functional as F

from pytest_lmeval.data import Rows
from pytest_lmeval.errors import ArgumentError, CorpusError, ProtocolError, SpecError, TaskError
from pytest_lmeval.models._classifier import HEAD, calls, classifier, last_hidden
from pytest_lmeval.models._model import Bytes
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._example import Example
from pytest_lmeval.scoring._metrics import compute, metrics_of, scored
from pytest_lmeval.tasks import Choices, Generate, Task, find, find_suite
from pytest_lmeval.training._finetune_verb import _task
from pytest_lmeval.training._majority import beside_majority, majority_of
from pytest_lmeval.training._questions import TrainingRow, batches_of, encoded, losses, split, training_rows
from pytest_lmeval.training._weights import copy_of


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
