"""Ask lm-evaluation-harness, this package and a vLLM server the same questions, and count what each reads.

python benchmarks/lm_eval_side.py theirs|ours MODEL DATA TASK SHOTS CERTIFICATE    prints the growth of the peak, in bytes
"""

import contextlib
import functools
import os
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch

from pytest_lmeval import load, policy_for
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.measures._task_audit import TaskAudit
from pytest_lmeval.profiling._peak import peak_memory
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.tasks import find

BATCH = 8
ROUNDS = 2
START = 600  # seconds that a server may take to come up


@dataclass
class Cost:
    """What a side took.

    seconds   of processor time, without audits
    calls     forward calls of the model, without those of audits
    tokens    that these calls read, without padding
    padding   places of their rows that hold no token
    audits    seconds of processor time of audits
    """

    seconds: float = 0.0
    calls: int = 0
    tokens: int = 0
    padding: int = 0
    audits: float = 0.0


@contextlib.contextmanager
def measured(module) -> Iterator[Cost]:
    """Count the block. Where no mask says otherwise, token 0 is padding: lm_eval fills rows with it, and no text holds it."""
    cost, auditing = Cost(), []

    def count(_, arguments, named):
        if not auditing:
            ids, mask = arguments[0] if arguments else named["input_ids"], named.get("attention_mask")
            told = mask is not None and mask.ndim == 2
            tokens = int((mask[:, -ids.shape[1] :] if told else ids != 0).sum())
            cost.calls, cost.tokens, cost.padding = cost.calls + 1, cost.tokens + tokens, cost.padding + ids.numel() - tokens

    def apart(method):
        def audit(*arguments):
            began = time.process_time()
            auditing.append(True)
            try:
                return method(*arguments)
            finally:
                auditing.pop()
                cost.audits += time.process_time() - began

        return audit

    with pytest.MonkeyPatch.context() as patch:
        for name in ("block", "end"):
            patch.setattr(TaskAudit, name, apart(getattr(TaskAudit, name)))
        hook = module.register_forward_pre_hook(count, with_kwargs=True)
        began = time.process_time()
        try:
            yield cost
        finally:
            hook.remove()
            cost.seconds = time.process_time() - began - cost.audits


def by_turns(**sides):
    """The result of each side and its cost in its fastest round; a side returns both."""
    rounds = [{name: side() for name, side in sides.items()} for _ in range(ROUNDS)]
    return {name: min((found[name] for found in rounds), key=lambda one: one[1].seconds) for name in sides}


def load_ours(folder):
    return load(f"hf:{folder}@fp32", device="cpu")


def load_theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=BATCH)


@functools.cache
def task_manager():
    """It reads the settings of all tasks, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def their_task(name, data, shots=0, **changes):
    """The task of lm_eval on the files of a mirror, with these changes of its settings."""
    from lm_eval.api.task import ConfigurableTask

    manager = task_manager()
    if name == "gsm8k":  # no family here has its prompts
        files = {split: str(data / "openai" / "gsm8k" / "main" / f"{split}.jsonl") for split in ("train", "test")}
    else:
        task = find(name)
        asked = str(task.rows.file(data))
        files = {"train": asked, task.rows.split: asked}  # it opens the training split even with no shots
        if shots:
            files["dev"] = str(task.shots.file(data))
    changes |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    built = ConfigurableTask(config=manager._factory._load_full_config(manager._index[name], changes))
    built.set_config(key="num_fewshot", value=shots)
    built.set_fewshot_seed(seed=1234)
    return built


def evaluate(lm, built):
    """The samples of lm_eval's evaluation by row, under its first filter, and its metrics."""
    import lm_eval

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = lm_eval.evaluate(lm, {"asked": built}, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    (samples,), (metrics,) = found["samples"].values(), found["results"].values()
    return list({sample["doc_id"]: sample for sample in reversed(samples)}.values())[::-1], metrics


def ask_theirs(theirs, built):
    with measured(theirs.model) as cost:
        found = evaluate(theirs, built)
    return found, cost


def ask_ours(ours, certificate, task, shots=0, data=None):
    policy = policy_for(ours, certificate, batch_size=BATCH)
    with measured(ours.module) as cost:
        found = measure_task(ours, task, policy=policy, shots=shots, data_dir=data)
    return found, cost


def unique_tokens(theirs, built):
    """Distinct prefixes of what the requests of an asked task read: no way reads fewer tokens."""
    nodes = {}
    for request in built.instances:
        context, continuation = theirs._encode_pair(*request.args)
        node = 0
        for token in (context + continuation)[:-1]:
            node = nodes.setdefault((node, token), len(nodes) + 1)
    return len(nodes)


def peak_growth(who, model, data, name, shots, certificate):
    """Growth of a process's peak while a side asks, in bytes, measured in a process of its own."""
    arguments = [sys.executable, __file__, who, str(model), str(data), name, str(shots), str(certificate)]
    return int(subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


@dataclass(frozen=True)
class Server:
    """A vLLM server, and lm_eval's client for it."""

    process: subprocess.Popen
    client: object

    def seconds(self):
        """Processor time of the server and the processes that it started."""
        import psutil

        server = psutil.Process(self.process.pid)
        return sum(sum(one.cpu_times()[:2]) for one in (server, *server.children(recursive=True)))

    def ask(self, built):
        began = self.seconds()
        found = evaluate(self.client, built)
        return found, Cost(seconds=self.seconds() - began)


@contextlib.contextmanager
def serve(env, model, log) -> Iterator[Server]:
    """Run the vLLM server of a Python environment on one core, in float32, and write what it says to `log`."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "2048",
               "--max-num-seqs", str(BATCH), "--enforce-eager"]  # fmt: skip
    command = [str(Path(env) / "bin" / "vllm"), "serve", str(model), *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    with log.open("w") as said, subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process:
        try:
            os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            url = f"http://127.0.0.1:{port}/v1/completions"
            yield Server(process, LocalCompletionsAPI(
                base_url=url, model=str(model), tokenizer_backend="huggingface", tokenized_requests=True, batch_size=BATCH,
                max_length=2048,
            ))  # fmt: skip
        finally:
            process.terminate()


def wait_for(url, process, log):
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    raise RuntimeError(f"the server is not up after {START} s, or ended: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    who, model, data, name, shots, certificate = sys.argv[1:]
    torch.set_num_threads(1)
    if who == "ours":
        lm, allowed = load_ours(model), msgspec.json.decode(Path(certificate).read_bytes(), type=Certificate)
        module, ask = lm.module, lambda: ask_ours(lm, allowed, find(name), int(shots), data)
    else:
        lm, built = load_theirs(model), their_task(name, Path(data), int(shots))
        module, ask = lm.model, lambda: ask_theirs(lm, built)
    with torch.no_grad():
        module(torch.ones(1, 1, dtype=torch.long))  # weights are read from their file when they are first used
    with peak_memory(torch.device("cpu")) as peak:
        ask()
    print(peak.growth)
