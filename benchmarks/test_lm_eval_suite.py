"""A mixed suite of lm_eval's catalogue on a real model and real rows, asked three ways: what each reads, takes and says.

    LMEVAL_REAL_MODEL=FOLDER LMEVAL_REAL_DATA=MIRROR pytest -s benchmarks/test_lm_eval_suite.py

    lm_eval       its evaluator and its model for transformers, batches of 8
    one tree      its evaluator and the model `pytest-lmeval`, which is given the requests of all tasks in one call
    task by task  the same, one task after the other, as `lmeval.suite` asks them

Each way has a process of its own, one thread, float32; audits are counted apart. The start-up is that of a fresh process.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import lm_eval_side as side
import msgspec
import pytest
import torch

from pytest_lmeval import Value, equivalence, policy_for
from pytest_lmeval.profiling._peak import peak_memory
from pytest_lmeval.records._certificate import Certificate

pytestmark = [pytest.mark.benchmark, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TASKS = {"hellaswag": 0, "arc_easy": 0, "piqa": 0, "boolq": 0, "mmlu_miscellaneous": 5, "gsm8k": 5}  # name -> shots
LIMIT, ANSWER = 24, 32  # questions of a task, of gsm8k a third; tokens of an answer
WAYS = ("lm_eval", "one tree", "task by task")


def built_tasks(data):
    settings = {"until": ["Question:"], "do_sample": False, "temperature": 0.0, "max_gen_toks": ANSWER}
    changes = {"gsm8k": {"generation_kwargs": settings, "fewshot_config": {"sampler": "first_n"}}}
    return {name: side.their_task(name, data, shots, **changes.get(name, {})) for name, shots in TASKS.items()}


def evaluated(lm, tasks):
    """task -> (its metrics, its samples) as lm_eval's evaluator writes them."""
    import lm_eval

    samples = {name: list(range(LIMIT // 3 if name == "gsm8k" else LIMIT)) for name in tasks}
    found = lm_eval.evaluate(lm, tasks, samples=samples, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    return {name: (found["results"][name], found["samples"][name]) for name in tasks}


def ask(way, model, data, certificate):
    """What one way says, and what it took."""
    torch.set_num_threads(1)
    tasks = built_tasks(Path(data))
    if way == "lm_eval":
        lm = side.load_theirs(model)
        module = lm.model
    else:
        from pytest_lmeval.lm_eval._model import LmevalModel

        ours, allowed = side.load_ours(model), msgspec.json.decode(Path(certificate).read_bytes(), type=Certificate)
        lm = LmevalModel.of(ours, policy_for(ours, allowed, batch_size=side.BATCH))
        module = ours.module
    with torch.no_grad():
        module(torch.ones(1, 1, dtype=torch.long))  # weights are read from their file when they are first used
    groups = [{name: task} for name, task in tasks.items()] if way == "task by task" else [tasks]
    with peak_memory(torch.device("cpu")) as peak, side.measured(module) as cost:
        found = {name: one for group in groups for name, one in evaluated(lm, group).items()}
    metrics = {name: {k: v for k, v in of_task.items() if isinstance(v, float)} for name, (of_task, _) in found.items()}
    answers = {name: [repr(sample["filtered_resps"])[:2000] for sample in samples] for name, (_, samples) in found.items()}
    likelihoods = {
        name: [[float(one) for one, _ in sample["filtered_resps"]] for sample in samples]
        for name, (_, samples) in found.items()
        if name != "gsm8k"
    }
    return {
        "seconds": cost.seconds, "calls": cost.calls, "tokens": cost.tokens, "padding": cost.padding, "audits": cost.audits,
        "peak": peak.growth, "metrics": metrics, "answers": answers["gsm8k"], "likelihoods": likelihoods,
    }  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    pytest.importorskip("lm_eval")
    for name in ("LMEVAL_REAL_MODEL", "LMEVAL_REAL_DATA"):
        if name not in os.environ:
            pytest.skip(f"no {name}")
    import real_rows

    folder, model = tmp_path_factory.mktemp("suite"), os.environ["LMEVAL_REAL_MODEL"]
    real_rows.save_rows(folder / "rows", Path(os.environ["LMEVAL_REAL_DATA"]))
    (folder / "certificate.json").write_bytes(msgspec.json.encode(equivalence(side.load_ours(model)).certificate))
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, way, model, str(folder / "rows"), str(folder / "certificate.json")]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[way] = json.loads(said.splitlines()[-1])
    return found


def test_the_suite(lmeval, asked):
    theirs = asked["lm_eval"]
    print(
        f"\n{'':14}{'processor s':>12}{'calls':>8}{'tokens':>9}{'padding':>9}{'audit s':>9}{'peak MiB':>10}{'times less':>12}"
    )
    for way, one in asked.items():
        print(
            f"{way:14}{one['seconds']:12.1f}{one['calls']:8,}{one['tokens']:9,}{one['padding']:9,}{one['audits']:9.1f}"
            f"{one['peak'] / 2**20:10.0f}{theirs['seconds'] / one['seconds']:12.2f}"
        )
        lmeval.record(
            "demo",
            f"mixed suite of lm_eval, {way}",
            processor_ratio=Value(theirs["seconds"] / one["seconds"], "x", higher_is_better=True),
            tokens_ratio=Value(theirs["tokens"] / one["tokens"], "x", higher_is_better=True),
            calls_ratio=Value(theirs["calls"] / one["calls"], "x", higher_is_better=True),
            peak_ratio=Value(one["peak"] / theirs["peak"], "x", higher_is_better=False),
        )
        assert one["metrics"] == {name: pytest.approx(of_task) for name, of_task in theirs["metrics"].items()}
        assert one["answers"] == theirs["answers"]
        for name, rows in theirs["likelihoods"].items():
            for row, other in zip(rows, one["likelihoods"][name], strict=True):
                assert row == pytest.approx(other, abs=1e-4, rel=1e-6)
    assert asked["one tree"]["tokens"] <= asked["task by task"]["tokens"]
    assert all(one["peak"] <= theirs["peak"] for one in asked.values())


@pytest.mark.parametrize("kept", [False, True], ids=["no index is kept", "the index is kept"])
def test_start_up(lmeval, tmp_path, kept):
    """Processor time until a task of the catalogue can be asked, beside lm_eval's own way to it."""
    pytest.importorskip("lm_eval")
    ours = "from pytest_lmeval.tasks import find; find('lm_eval:hellaswag')"
    theirs = "from lm_eval.tasks import TaskManager; TaskManager()"
    environment, seconds = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, {}
    if kept:
        subprocess.run([sys.executable, "-c", ours], env=environment, check=True)
    for who, code in (("here", ours), ("lm_eval", theirs)):
        timed = f"import time; began = time.process_time()\n{code}\nprint(time.process_time() - began)"
        said = subprocess.run([sys.executable, "-c", timed], env=environment, stdout=subprocess.PIPE, text=True, check=True)
        seconds[who] = float(said.stdout.split()[-1])
    what = f"start-up, {'the index is kept' if kept else 'no index is kept'}"
    print(f"\n{what}: {seconds['here']:.1f} s of processor time, lm_eval {seconds['lm_eval']:.1f} s")
    lmeval.record("demo", what, ratio=Value(seconds["lm_eval"] / seconds["here"], "x", higher_is_better=True))


if __name__ == "__main__":
    began = time.perf_counter()
    result = ask(*sys.argv[1:])
    print(f"{sys.argv[1]}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(json.dumps(result))
