"""The same questions, asked by lm-evaluation-harness and by this package: the same answers, and what each of them reads for them.

One model folder, one set of files, float32 on the CPU, batches of 8. Forward operations are counted, so they are free of noise;
processor time is taken by turns, on one thread.
"""

import itertools
import time
import warnings

import pytest
import torch

from pytest_lmeval import Metric, evaluate, load
from pytest_lmeval.profiling.flops import count_flops
from pytest_lmeval.tasks import find

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

BATCH = 8
ROUNDS = 3
TASKS = {  # what is asked: shots, and how many times fewer operations that must take
    "sst2": (0, 1.0),
    "boolq": (0, 2.0),
    "hellaswag": (0, 2.5),
    "mmlu_abstract_algebra": (5, 5.0),
}
LEAST = 1.10  # operations, at most, over those of reading every distinct token once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import small_suite

    pytest.importorskip("lm_eval")
    model, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    small_suite.save_model(model)
    small_suite.save_data(data)
    return model, data


@pytest.fixture(scope="module")
def ours(folders):
    return load(f"hf:{folders[0]}@fp32", device="cpu")


@pytest.fixture(scope="module")
def theirs(folders):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folders[0]), device="cpu", dtype="float32", batch_size=BATCH)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask_theirs(theirs, name, shots, data):
    """Samples of lm_eval, in the order of the rows: log-likelihoods of the choices, and its metrics."""
    import lm_eval

    task = find(name)
    files = {split: str(task.rows.of(split).file(data)) for split in ({"dev", "test"} if shots else {task.rows.split})}
    own = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = lm_eval.simple_evaluate(
            model=theirs, tasks=[own], num_fewshot=shots, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
        )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [[likelihood for likelihood, _ in sample["filtered_resps"]] for sample in samples], found["results"][name]


def ask_ours(ours, name, shots, data):
    return evaluate(ours, find(name), shots=shots, batch_size=BATCH, data_dir=data)


def by_turns(*works):
    """Processor seconds of each, the fastest of some rounds, taken by turns."""
    times = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, taken in zip(works, times, strict=True):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
    return [min(taken) for taken in times]


@pytest.mark.parametrize("name", TASKS)
def test_the_same_answers_for_less(lmeval, ours, theirs, folders, name):
    shots, times_fewer = TASKS[name]
    data = folders[1]
    expected, metrics = ask_theirs(theirs, name, shots, data)
    found = ask_ours(ours, name, shots, data)
    pairs = list(zip(expected, (example.loglikelihoods for example in found.examples), strict=True))
    worst = max(abs(a - b) for theirs_, ours_ in pairs for a, b in zip(theirs_, ours_, strict=True))
    alike = sum(max(range(len(a)), key=a.__getitem__) == max(range(len(b)), key=b.__getitem__) for a, b in pairs)
    assert worst < 1e-4
    assert alike == len(expected)
    assert found.accuracy == metrics["acc,none"]
    if "acc_norm,none" in metrics:
        assert found.accuracy_per_character == metrics["acc_norm,none"]

    spent = [count_flops(lambda: ask_theirs(theirs, name, shots, data)), count_flops(lambda: ask_ours(ours, name, shots, data))]
    least = count_flops(lambda: read_once(ours, found, name, shots, data))
    seconds = by_turns(lambda: ask_theirs(theirs, name, shots, data), lambda: ask_ours(ours, name, shots, data))
    lmeval.record(
        ours,
        f"{name}, {shots}-shot, against lm_eval",
        worst_difference=Metric(worst, "nats", n=len(expected), higher_is_better=False),
        flops_ratio=Metric(spent[0] / spent[1], "x", higher_is_better=True),
        flops_over_least=Metric(spent[1] / least, "x", higher_is_better=False),
        processor_ratio=Metric(seconds[0] / seconds[1], "x", higher_is_better=True),
    )
    assert spent[0] / spent[1] >= times_fewer
    assert spent[1] / least <= LEAST


def read_once(ours, found, name, shots, data):
    """Every distinct token prefix of the task once, in one go: its operations are the fewest that can be."""
    raise NotImplementedError
