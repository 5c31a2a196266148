"""Start a real vLLM server from the environment that LMEVAL_VLLM_ENV names, with a model folder, on the CPU or a GPU."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import torch

MISSING = "needs LMEVAL_VLLM_ENV=FOLDER, a Python environment with vLLM"
PATIENCE = 600  # seconds until the server is up
ON_CPU = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def environment():
    """The folder of the environment; None if none is named."""
    named = os.environ.get("LMEVAL_VLLM_ENV")
    return Path(named) if named else None


@contextlib.contextmanager
def vllm(model, log, *options, longest=2048):
    """(url, pid) of a server of the model folder, in float32; it is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len",
                 str(longest), "--max-num-seqs", "8", "--enforce-eager", *options]  # fmt: skip
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | QUIET
    settings |= {} if torch.cuda.is_available() else ON_CPU
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [environment() / "bin" / "vllm", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=settings,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + PATIENCE
            while not is_up(url):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"vLLM is not up: {Path(log).read_text(errors='replace')[-3000:]}")
                time.sleep(1)
            yield url, process.pid
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def is_up(url):
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def processor_seconds(pid):
    """Processor time of a process and of all that it has started and still run."""
    parents, times = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)], times[int(folder.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {pid}
    while more := {one for one, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(times.get(one, 0) for one in family) / os.sysconf("SC_CLK_TCK")
