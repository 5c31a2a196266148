"""The same questions, asked by lm-evaluation-harness and by this package: the same answers, and what each reads for them.

One model folder, one set of files, float32 on the CPU, batches of 8. Forward operations are counted, so they are free of noise;
processor time is taken by turns, on one thread.
"""

import time
import warnings

import pytest
import torch

from pytest_lmeval import Metric, evaluate, load
from pytest_lmeval.profiling.flops import count_flops
from pytest_lmeval.scoring.fewshot import Shots
from pytest_lmeval.scoring.metrics import LM_EVAL_NAMES
from pytest_lmeval.scoring.requests import Encoder
from pytest_lmeval.task import id_of
from pytest_lmeval.tasks import find

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

BATCH = 8
ROUNDS = 2
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


@pytest.fixture(scope="module")
def harness():
    """(name, shots, mirror) -> the task of lm_eval over the files of the mirror."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    manager = TaskManager()

    def build(name, shots, data):
        task = find(name)
        asked = str(task.rows.file(data))
        files = {"train": asked, task.rows.split: asked}  # it opens the training split even where nothing is shown
        if shots:
            files["dev"] = str(task.shots.file(data))
        mirrored = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        built = ConfigurableTask(config=manager._factory._load_full_config(manager._index[name], mirrored))
        built.set_config(key="num_fewshot", value=shots)
        built.set_fewshot_seed(seed=1234)
        return built

    def ask(theirs, built):
        """Log-likelihoods of the choices of each row, and the metrics."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = lm_eval.evaluate(theirs, {"asked": built}, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
        (samples,), (metrics,) = found["samples"].values(), found["results"].values()
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        return [[likelihood for likelihood, _ in sample["filtered_resps"]] for sample in samples], metrics

    return build, ask


def ask_ours(ours, name, shots, data):
    return evaluate(ours, find(name), shots=shots, batch_size=BATCH, data_dir=data)


def counted(work):
    """What the work returns, and its forward operations."""
    kept = []
    flops = count_flops(lambda: kept.append(work()))
    return kept[0], flops


def by_turns(*works):
    """Processor seconds of each, the fastest of some rounds, taken by turns."""
    times = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, taken in zip(works, times, strict=True):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
    return [min(taken) for taken in times]


def least_operations(ours, name, shots, data):
    """Of reading every distinct token prefix of a task once, and of the logits that are scored: no way needs fewer."""
    task, encoder = find(name), Encoder(ours, find(name))
    examples = Shots(task, shots, "document", data_dir=data)
    prefixes, scored = set(), set()
    for number, row in enumerate(task.rows.read(data)):
        own = id_of(row)
        for request in encoder.encode(task.ask(row), examples.of(row, own), id=own, number=number).requests:
            ids = request.read.tobytes()
            prefixes |= {ids[: 8 * length] for length in range(1, len(request.read) + 1)}
            scored |= {ids[: 8 * length] for length in range(request.given, len(request.read) + 1)}
    config = ours.module.config
    head = 2 * config.hidden_size * ours.vocab_size
    attention = 4 * config.hidden_size * config.num_hidden_layers  # of a token to each that it sees, itself too
    linear = count_flops(lambda: ours.step(ours.random_ids(1, 1), keep=1)) - head - attention
    seen = sum(len(prefix) // 8 for prefix in prefixes)
    return len(prefixes) * linear + seen * attention + len(scored) * head


@pytest.mark.parametrize("name", TASKS)
def test_the_same_answers_for_less(lmeval, ours, theirs, harness, folders, name):
    (shots, times_fewer), data, (build, ask) = TASKS[name], folders[1], harness
    built = build(name, shots, data)
    (expected, metrics), their_flops = counted(lambda: ask(theirs, built))
    found, our_flops = counted(lambda: ask_ours(ours, name, shots, data))
    pairs = list(zip(expected, (example.loglikelihoods for example in found.examples), strict=True))
    worst = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    alike = sum(max(range(len(a)), key=a.__getitem__) == max(range(len(b)), key=b.__getitem__) for a, b in pairs)
    seconds = by_turns(lambda: ask(theirs, built), lambda: ask_ours(ours, name, shots, data))
    least = least_operations(ours, name, shots, data)
    lmeval.record(
        ours,
        f"{name}, {shots}-shot, against lm_eval",
        worst_difference=Metric(worst, "nats", n=len(expected), higher_is_better=False),
        same_predictions=Metric(alike / len(expected), n=len(expected), higher_is_better=True),
        flops_ratio=Metric(their_flops / our_flops, "x", higher_is_better=True),
        flops_over_least=Metric(our_flops / least, "x", higher_is_better=False),
        processor_ratio=Metric(seconds[0] / seconds[1], "x", higher_is_better=True),
    )
    assert worst < 1e-4
    assert alike == len(expected)
    for theirs_, ours_ in LM_EVAL_NAMES.items():
        if (known := metrics.get(f"{theirs_},none")) is not None and ours_ in found.record.metrics:
            assert found.record.metrics[ours_] == pytest.approx(known, abs=1e-12)
    assert their_flops / our_flops >= times_fewer
    assert our_flops / least <= LEAST
