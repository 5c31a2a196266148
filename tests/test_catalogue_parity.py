"""A sample of the catalogue's tasks is asked and scored as by lm_eval itself, and faults that are planted here are found.

`benchmarks/test_lm_eval_parity.py` holds all 130 tasks, and how they are compared.
"""

import dataclasses
import functools
import logging
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="it is asked beside us: pip install 'pytest-lmeval[lm-eval]'")
pytest.importorskip("accelerate", reason="lm_eval's own model of transformers needs it")
import test_lm_eval_parity as parity
from lm_eval.tasks import TaskManager
from lm_eval_rows import TEXTS
from probing import certificate

from pytest_lmeval import as_model, policy_for
from pytest_lmeval.engine._tree import Request
from pytest_lmeval.lm_eval import _names, _task
from pytest_lmeval.scoring._lm_eval_requests import LmEvalEncoder

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]  # lm_eval's and those of what it imports

sides = parity.sides  # a fixture
SAMPLE = ["arc_easy", "hellaswag", "blimp_causative", "truthfulqa_mc2", "lambada_openai", "wikitext", "pile_10k", "triviaqa"]
RIGHT = ["gsm8k", "mgsm_direct_de", "drop"]


@pytest.fixture(scope="module", autouse=True)
def few_files():
    """lm_eval reads the folders of these tasks; all 14,000 files take it 15 seconds."""
    folders = {str(Path(_names._index()[name].file).parent) for name in SAMPLE + RIGHT}
    manager = TaskManager(include_defaults=False, include_path=sorted(folders))
    with mock.patch.object(parity.side, "task_manager", return_value=manager):
        yield


@pytest.fixture
def compare(sides, monkeypatch):
    return functools.partial(parity.compare, sides, monkeypatch, [])


@pytest.mark.parametrize("name", SAMPLE)
def test_a_task_is_asked_and_scored_as_by_lm_eval(compare, name):
    compare(name)


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_are_scored_as_by_lm_eval(compare, name):
    compare(name, right=True)


def test_examples_and_a_chat_are_those_of_lm_eval(compare):
    compare("arc_easy", shots=2)
    compare("triviaqa", chat=True, shots=2)


def louder(monkeypatch, sides):
    """A model here whose log-likelihoods are off by about a hundredth of a nat."""
    step = sides.lm.step_fn

    def changed(*arguments, **options):
        logits, state = step(*arguments, **options)
        return logits * 1.001, state

    return dataclasses.replace(sides, lm=dataclasses.replace(sides.lm, step_fn=changed, module=None))


def unfiltered(monkeypatch, sides):
    """The answers are scored as the model gives them."""

    def unread(source, document, instances):
        found = {}
        for ensemble in source._filters:
            values = source.process_results(document, [instance.resps[0] for instance in instances])
            found |= {metric if ensemble.name == "none" else f"{metric},{ensemble.name}": one for metric, one in values.items()}
        return found

    monkeypatch.setattr(_task, "_scored", unread)


def of_another_seed(monkeypatch, sides):
    """Other examples are shown."""
    monkeypatch.setattr(_task, "FEWSHOT_SEED", 1)


def averaged(monkeypatch, sides):
    """Every metric is the mean over the rows."""

    def mean(source, name):
        return lambda items: float(np.mean([np.divide(*item) if isinstance(item, tuple) else item for item in items])), None

    monkeypatch.setattr(_task, "_combined", mean)


def late(monkeypatch, sides):
    """The first token of every text is left out."""
    windows = LmEvalEncoder._windows

    def later(self, text, where):
        first, *others = windows(self, text, where)
        return [Request(first.ids, first.context_len + 1), *others]

    monkeypatch.setattr(LmEvalEncoder, "_windows", later)


@pytest.mark.parametrize(
    ("fault", "task", "options"),
    [
        (louder, "arc_easy", {}),
        (unfiltered, "gsm8k", {"right": True}),
        (of_another_seed, "arc_easy", {"shots": 2}),
        (averaged, "wikitext", {}),
        (late, "pile_10k", {}),
    ],
)
def test_a_planted_fault_is_found(sides, monkeypatch, fault, task, options):
    faulty = fault(monkeypatch, sides) or sides
    with pytest.raises(AssertionError):
        parity.compare(faulty, monkeypatch, [], task, **options)


def test_what_long_texts_differ_by_is_the_rounding_of_float32(sides):
    """In float64, lm_eval's sum and ours agree whatever the length; in float32, ours is no further from it than lm_eval's."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from pytest_lmeval.lm_eval._model import LmevalModel

    texts, sums = [TEXTS[0] * count for count in (1, 60, 200)], {}
    module, tokenizer = sides.theirs.model, sides.theirs.tokenizer
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    logging.disable(logging.WARNING)
    try:
        for kind in ("float", "double"):
            getattr(module, kind)()
            theirs = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=1, max_length=parity.CONTEXT)
            lm = as_model(module, tokenizer=tokenizer, spec="tiny")
            ours = LmevalModel.of(lm, policy_for(lm, certificate(), batch_size=4))
            sums["theirs", kind] = [theirs.loglikelihood_rolling([one], disable_tqdm=True)[0] for one in requests]
            sums["ours", kind] = ours.loglikelihood_rolling(requests)
    finally:
        module.float()
        logging.disable(logging.NOTSET)
    exact = np.array(sums["theirs", "double"])
    assert exact[-1] < -10_000  # nats, of which float32 cannot tell a thousandth
    assert sums["ours", "double"] == pytest.approx(exact, abs=1e-9, rel=0)
    ours, theirs = (np.abs(np.array(sums[side, "float"]) - exact).max() for side in ("ours", "theirs"))
    assert 1e-5 < ours <= theirs
