"""Compare answers and cost with lm-evaluation-harness on the same questions.

One model folder, one set of files, float32 on the CPU, batches of 8. Forward operations are counted, which has no noise;
processor time is measured by turns, on one thread.
"""

import dataclasses
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from pytest_lmeval import Corpus, Value, corpus, load, policy_for
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.models._flops import count_flops
from pytest_lmeval.scoring._fewshot import Shots
from pytest_lmeval.scoring._metrics import LM_EVAL_NAMES
from pytest_lmeval.scoring._requests import Encoder
from pytest_lmeval.tasks import find, id_of

pytestmark = [pytest.mark.benchmark, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BATCH = 8
ROUNDS = 2
TASKS = {  # name -> shots, and the least ratio of lm_eval's operations to ours
    "sst2": (0, 1.0),
    "boolq": (0, 2.0),
    "hellaswag": (0, 2.5),
    "mmlu_abstract_algebra": (5, 5.0),
}
MOST = 1.10  # times the operations of reading every distinct token once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import small_suite

    pytest.importorskip("lm_eval")
    model, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    small_suite.save_model(model)
    small_suite.save_data(data)
    return model, data


def load_ours(folder):
    return load(f"hf:{folder}@fp32", device="cpu")


def load_theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=BATCH)


@pytest.fixture(scope="module")
def ours(folders):
    return load_ours(folders[0])


@pytest.fixture(scope="module")
def theirs(folders):
    return load_theirs(folders[0])


def their_task(name, shots, data):
    """The task of lm_eval on the files of a mirror."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    task = find(name)
    asked = str(task.rows.file(data))
    files = {"train": asked, task.rows.split: asked}  # it opens the training split even with no shots
    if shots:
        files["dev"] = str(task.shots.file(data))
    mirrored = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    built = ConfigurableTask(config=manager._factory._load_full_config(manager._index[name], mirrored))
    built.set_config(key="num_fewshot", value=shots)
    built.set_fewshot_seed(seed=1234)
    return built


def ask_theirs(theirs, built):
    """The log-likelihoods of each row's choices, and the metrics."""
    import lm_eval

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = lm_eval.evaluate(theirs, {"asked": built}, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    (samples,), (metrics,) = found["samples"].values(), found["results"].values()
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return [[likelihood for likelihood, _ in sample["filtered_resps"]] for sample in samples], metrics


def ask_ours(ours, name, shots, data):
    return measure_task(ours, find(name), policy=policy_for(ours, batch_size=BATCH), shots=shots, data_dir=data)


def counted(work):
    """The result of the work, and its forward operations."""
    results = []
    flops = count_flops(lambda: results.append(work()))
    return results[0], flops


def by_turns(*works):
    """Processor seconds of each, the fastest of its rounds, by turns."""
    times = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, taken in zip(works, times, strict=True):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
    return [min(taken) for taken in times]


def least_operations(ours, name, shots, data):
    """Operations of reading every distinct token prefix once, and of the scored logits: no way needs fewer."""
    task, encoder = find(name), Encoder(ours, find(name))
    examples = Shots(task, shots, "document", data_dir=data)
    prefixes, scored = set(), set()
    for number, row in enumerate(task.rows.read(data)):
        own = id_of(row)
        for request in encoder.encode(task.ask(row), examples.of(row, own), id=own, number=number).requests:
            ids = request.read.tobytes()
            prefixes |= {ids[: 8 * length] for length in range(1, len(request.read) + 1)}
            scored |= {ids[: 8 * length] for length in range(request.context_len, len(request.read) + 1)}
    config = ours.module.config
    head = 2 * config.hidden_size * ours.vocab_size
    attention = 4 * config.hidden_size * config.num_hidden_layers  # of a token to each visible one, itself too
    linear = count_flops(lambda: ours.step(ours.random_ids(1, 1), keep=1)) - head - attention
    seen = sum(len(prefix) // 8 for prefix in prefixes)
    return len(prefixes) * linear + seen * attention + len(scored) * head


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_the_same_for_fewer_operations(lmeval, ours, theirs, folders, name):
    (shots, times_fewer), data = TASKS[name], folders[1]
    built = their_task(name, shots, data)
    (expected, metrics), their_flops = counted(lambda: ask_theirs(theirs, built))
    found, our_flops = counted(lambda: ask_ours(ours, name, shots, data))
    pairs = list(zip(expected, (example.loglikelihoods for example in found.examples), strict=True))
    worst = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    same = sum(max(range(len(a)), key=a.__getitem__) == max(range(len(b)), key=b.__getitem__) for a, b in pairs)
    seconds = by_turns(lambda: ask_theirs(theirs, built), lambda: ask_ours(ours, name, shots, data))
    least = least_operations(ours, name, shots, data)
    lmeval.record(
        ours,
        f"{name}, {shots}-shot, against lm_eval",
        worst_difference=Value(worst, "nats", n=len(expected), higher_is_better=False),
        same_predictions=Value(same / len(expected), n=len(expected), higher_is_better=True),
        flops_ratio=Value(their_flops / our_flops, "x", higher_is_better=True),
        flops_over_least=Value(our_flops / least, "x", higher_is_better=False),
        processor_ratio=Value(seconds[0] / seconds[1], "x", higher_is_better=True),
    )
    assert worst < 1e-4
    assert same == len(expected)
    both = {ours_: metrics[key] for theirs_, ours_ in LM_EVAL_NAMES.items() if (key := f"{theirs_},none") in metrics}
    both = {name: known for name, known in both.items() if name in found.record.metrics}
    assert both
    assert {name: float(found.record.metrics[name]) for name in both} == pytest.approx(both, abs=1e-12)
    assert their_flops / our_flops >= times_fewer
    assert our_flops / least <= MOST


MEMORY = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_against_lm_eval as page
torch.set_num_threads(1)
model, data, name, shots = Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], int(sys.argv[6])
if sys.argv[2] == "ours":
    lm = page.load_ours(model)
    work = lambda: page.ask_ours(lm, name, shots, data)
else:
    lm, built = page.load_theirs(model), page.their_task(name, shots, data)
    work = lambda: page.ask_theirs(lm, built)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["boolq", "mmlu_abstract_algebra"])
def test_memory_is_at_most_that_of_lm_eval(lmeval, tmp_path, folders, name):
    """Growth of a process's peak while it asks, with a vocabulary of 32,000."""
    import small_suite

    small_suite.save_model(tmp_path, hidden=128, layers=4, vocabulary=32_000)
    shots, grown = TASKS[name][0], {}
    for who in ("theirs", "ours"):
        arguments = [str(Path(__file__).parent), who, str(tmp_path), str(folders[1]), name, str(shots)]
        done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
        grown[who] = 1024 * int(done.stdout.split()[-1])
    lmeval.record(
        load_ours(tmp_path),
        f"memory, {name}, {shots}-shot",
        ours=Value(grown["ours"], "bytes", higher_is_better=False),
        lm_eval=Value(grown["theirs"], "bytes", higher_is_better=False),
    )
    assert grown["ours"] <= grown["theirs"]


def test_the_first_answers_come_after_one_batch(lmeval, ours, folders):
    """Rows read before the first answers; lm_eval reads all rows first, and answers at its end."""
    after = []
    rows = list(find("sst2").rows.read(folders[1]))
    task = dataclasses.replace(find("sst2"), rows=lambda: (after.append("row") or row for row in rows))
    firsts = []
    measure_task(ours, task, policy=policy_for(ours, batch_size=BATCH), progress=lambda *_: firsts.append(len(after)))
    lmeval.record(ours, "first answers, sst2", rows_read=Value(firsts[0], n=len(rows), higher_is_better=False))
    assert firsts[0] == BATCH


def test_rolling_perplexity_is_that_of_lm_eval(lmeval, ours, theirs):
    """Long documents in the windows of lm_eval: the same sum of log-likelihoods."""
    from types import SimpleNamespace

    documents = [document for document, _ in zip(corpus("stdlib", "test").documents(), range(4), strict=False)]
    expected = theirs.loglikelihood_rolling([SimpleNamespace(args=(document.text,)) for document in documents])
    worst = 0.0
    for document, their_sum in zip(documents, expected, strict=True):
        alone = Corpus(document.name, "test", lambda document=document: iter([document]), as_stream=False)
        found = measure_perplexity(ours, alone, policy=policy_for(ours, window="lm_eval"))
        worst = max(worst, abs(float(found.nll) + their_sum / found.tokens))
    lmeval.record(ours, "rolling, against lm_eval", worst_difference=Value(worst, "nats/token", higher_is_better=False))
    assert worst < 1e-4
