"""Fine-tuning by one protocol: each kind of answer is learned, shuffled labels are not, a killed one goes on to the same."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuning_tasks import ANSWER, CHOICE, CLASSES, LEARN, byte_model, shuffled, tuned
from tiny_models import Functional, small_transformer

from pytest_lmeval.errors import SpecError, TaskError
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.models._classifier import HEAD
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records import load
from pytest_lmeval.records._journal import Saver

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


# ---------------------------------------------------------------------------------------------------- the verb

OWN = """
    import random
    from pytest_lmeval import Choices, Task

    def rows(count, seed):
        drawn = random.Random(seed)
        return [{"n": seed * 1000 + n, "label": drawn.randrange(2)} for n in range(count)]

    def ask(row):
        return Choices(f"{row['n']} {'abcd'[2 * row['label']]}", ("no", "yes"), row["label"])

    TASK = Task("letters", rows(12, 1), ask, train=rows(40, 2))

    def test_learns(lmeval, lm):
        result = lmeval.finetune(lm, TASK, seeds=2, lr=1e-2, batch_size=8, epochs=1)
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
        assert len((project.path / ".lmeval" / record.examples).read_text().splitlines()) == 12
        assert record.settings["seeds"] == [0, 1]
        assert record.certificate is not None
    again = project.runpytest_subprocess(*options[:4], "-k", "learns")
    again.stdout.fnmatch_lines(["*tiny:Tiny on letters: fine-tuned before with the seeds 0, 1*"])
