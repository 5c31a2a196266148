"""Run the tests' own pytest runs as forks of a process that has imported everything they need, has read the corpus `stdlib`,
and has done nothing else.

Most tests of the plugin start a pytest of their own, which would spend nine tenths of its time on imports. In a fork, what
Python reads when it starts (PYTHONHASHSEED, PYTHONWARNINGS) has no effect, and warnings of those imports do not show: a test
of them starts a Python of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from typing import IO, Any, NoReturn

LIBRARIES = ("torch", "torch._dynamo", "torch.profiler", "torch.utils.flop_counter", "numpy", "hypothesis", "jinja2", "msgspec")
TAKEN = ("torchmetrics", "transformers.modeling_utils", "transformers.tokenization_utils_tokenizers")  # optional, and dear
OPTIONAL = ("moshi", "huggingface", "kernels")  # modules that import an optional, heavy library


class ForkServer:
    """Starts `python -m pytest` as `subprocess.Popen` would, one at a time; the server starts with the first of them."""

    stdin = None  # pytester reads it from a Popen
    _unanswered = False

    @functools.cached_property
    def _server(self) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def popen(self, arguments: Sequence[str], stdout: IO[str], stderr: IO[str], **_: Any) -> ForkServer:
        """A run with these arguments of pytest, its output in the two files."""
        if self._unanswered:
            self.wait()  # for a run that nobody waited for
        cwd, output = os.getcwd(), [str(stdout.name), str(stderr.name)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [cwd, os.environ.get("PYTHONPATH")]))}
        order = {"arguments": arguments, "cwd": cwd, "env": env, "output": output}
        assert self._server.stdin is not None
        print(json.dumps(order), file=self._server.stdin, flush=True)
        self._unanswered = True
        return self

    def wait(self) -> int:
        """The exit status of the run."""
        assert self._server.stdout is not None
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"{__file__} ended with status {self._server.wait()}; its last words are in stderr.")
        self._unanswered = False
        return int(answer)

    def close(self) -> None:
        if "_server" in self.__dict__:
            self._server.communicate()


class Imports:
    """A plugin of pytest that imports everything while pytest rewrites assertions, so that a fork need not do it again."""

    def pytest_sessionstart(self) -> None:
        for name in LIBRARIES:
            importlib.import_module(name)
        package = importlib.import_module("pytest_lmeval")
        for module in pkgutil.walk_packages(package.__path__, "pytest_lmeval."):
            if not module.name.endswith(OPTIONAL):
                importlib.import_module(module.name)
        for name in TAKEN:
            with contextlib.suppress(ImportError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        importlib.import_module("pytest_lmeval.data").corpus("stdlib")  # its documents are kept
        for module in ("pytest_lmeval.registry", "pytest_lmeval.records._metric"):  # a fork may find other packages
            for thing in vars(importlib.import_module(module)).values():
                if hasattr(thing, "cache_clear"):
                    thing.cache_clear()


def main() -> None:
    """Read orders, a line each, and answer with exit statuses."""
    import pytest

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as empty:
        pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", empty, empty], plugins=[Imports()])
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _run(arguments: list[str], cwd: str, env: dict[str, str], output: list[str]) -> NoReturn:
    for target, name in enumerate([os.devnull, *output]):
        os.dup2(os.open(name, os.O_RDWR), target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["pytest", *arguments]
    sys.path[0] = cwd  # as `python -m` does; this file's folder was there
    try:
        runpy.run_module("pytest", run_name="__main__", alter_sys=True)
    except SystemExit as end:  # without tearing down all modules, which copies the memory that is shared with the server
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(int(end.code or 0))
    sys.exit()


if __name__ == "__main__":
    main()
