"""A real vLLM server under load, beside vLLM's own `vllm bench serve`, in turns: counts, tokens and times.

    LMEVAL_REAL_MODEL=FOLDER LMEVAL_VLLM_ENV=ENV pytest -s benchmarks/test_load.py

Both send the same number of requests of random tokens, with as many under way, and ask for the same number of tokens.
The ratio of their times has an interval from the pairs of runs; the width says how large a difference would have been seen.
"""

import json
import math
import os
import subprocess
from pathlib import Path

import lm_eval_side as side
import pytest

from pytest_lmeval import Value, load, load_test
from pytest_lmeval.statistics._paired import log_ratio

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

RUNS, REQUESTS, CONCURRENCY, PROMPT, NEW = 5, 24, 4, 64, 16
NAMES = {"ttft": "median_ttft_ms", "tpot": "median_tpot_ms", "e2e": "median_e2el_ms"}  # ours and theirs


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    for name in ("LMEVAL_REAL_MODEL", "LMEVAL_VLLM_ENV"):
        if name not in os.environ:
            pytest.skip(f"no {name}")
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with side.serve(os.environ["LMEVAL_VLLM_ENV"], os.environ["LMEVAL_REAL_MODEL"], log) as served:
        yield served.client.base_url.removesuffix("/v1/completions")


def theirs(url, folder, seed):
    """What `vllm bench serve` measures."""
    model = os.environ["LMEVAL_REAL_MODEL"]
    command = [
        str(Path(os.environ["LMEVAL_VLLM_ENV"]) / "bin" / "vllm"), "bench", "serve", "--backend", "vllm", "--base-url", url,
        "--model", model, "--tokenizer", model, "--dataset-name", "random", "--random-input-len", str(PROMPT),
        "--random-output-len", str(NEW), "--num-prompts", str(REQUESTS), "--max-concurrency", str(CONCURRENCY), "--ignore-eos",
        "--seed", str(seed), "--save-result", "--result-dir", str(folder), "--result-filename", f"{seed}.json",
        "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    said = subprocess.run(command, env=environment | quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert said.returncode == 0, said.stdout[-2000:]
    return json.loads((folder / f"{seed}.json").read_text())


def test_times_are_those_of_vllms_own_benchmark(lmeval, url, tmp_path):
    lm = load(f"server:{url},tokenizer={os.environ['LMEVAL_REAL_MODEL']}")
    both = {"ours": [], "theirs": []}
    for number in range(RUNS):
        for who in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            if who == "theirs":
                found = theirs(url, tmp_path, number + 1)
                assert (found["completed"], found["total_output_tokens"]) == (REQUESTS, REQUESTS * NEW)
                both[who].append({name: found[key] for name, key in NAMES.items()} | {"output": found["output_throughput"]})
            else:
                result = load_test(
                    lm, concurrency=CONCURRENCY, requests=REQUESTS, prompt_tokens=PROMPT, new_tokens=NEW, seed=number + 1,
                    warm_up=1,
                )  # fmt: skip
                assert result.record.details["tokens_generated"] == REQUESTS * NEW
                assert result.failed == 0
                metrics = result.record.metrics
                both[who].append(
                    {name: float(metrics[name]) for name in NAMES} | {"output": float(result.output_tokens_per_second)}
                )
                busy = float(metrics["client_busy"]) * result.record.cost.seconds / REQUESTS
    print(f"\n{'':8}{'ours':>10}{'vllm bench':>12}{'ratio':>8}   95 % interval")
    within = {}
    for name in (*NAMES, "output"):
        ours, their = ([run[name] for run in both[who]] for who in ("ours", "theirs"))
        found = log_ratio(their, ours)
        low, high = math.exp(found.low), math.exp(found.high)
        ratio = math.exp(found.value)
        print(f"{name:8}{sum(ours) / RUNS:10.1f}{sum(their) / RUNS:12.1f}{ratio:8.3f}   {low:.3f} to {high:.3f}")
        lmeval.record(
            "demo", f"vLLM under load, {name}, ours / vllm bench serve", ratio=Value(ratio, low=low, high=high, n=RUNS)
        )
        within[name] = low <= 1 <= high
    print(f"processor time of this client: {1000 * busy:.1f} ms a request")
    assert all(within.values()), within
