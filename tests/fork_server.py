"""Where the pytest runs of the tests are born: forked from a process that has imported torch, and has done nothing else.

Most tests of the plugin start a pytest of their own, and half of its time would go into importing torch. What a Python looks at
when it starts (PYTHONHASHSEED, PYTHONWARNINGS) does nothing here, and no warning of that import is seen: what is about those
starts a Python of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any, NoReturn

IMPORTED = ("torch", "torch._dynamo", "torch.utils.flop_counter")


class ForkServer:
    """Starts `python -m pytest` as `subprocess.Popen` would, one at a time."""

    stdin = None  # as pytester asks a Popen

    def __init__(self) -> None:
        self._unanswered = False
        self._mother = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def popen(self, arguments: Sequence[str], stdout: IO[str], stderr: IO[str], **_: Any) -> ForkServer:
        """A run with these arguments of pytest, its output in the two files."""
        if self._unanswered:
            self.wait()  # of a run that nobody waited for
        cwd, output = os.getcwd(), [str(stdout.name), str(stderr.name)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [cwd, os.environ.get("PYTHONPATH")]))}
        order = {"arguments": arguments, "cwd": cwd, "env": env, "output": output}
        assert self._mother.stdin is not None
        print(json.dumps(order), file=self._mother.stdin, flush=True)
        self._unanswered = True
        return self

    def wait(self) -> int:
        """The exit status of the run."""
        assert self._mother.stdout is not None
        answer = self._mother.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"{__file__} ended with status {self._mother.wait()} and forks no more runs; its words are in stderr."
            )
        self._unanswered = False
        return int(answer)

    def close(self) -> None:
        self._mother.communicate()


def main() -> None:
    """Read orders, a line each, and answer with exit statuses."""
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(arguments: list[str], cwd: str, env: dict[str, str], output: list[str]) -> NoReturn:
    for target, name in enumerate([os.devnull, *output]):
        os.dup2(os.open(name, os.O_RDWR), target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["pytest", *arguments]
    sys.path[0] = cwd  # as `python -m` does; this file's folder stood there
    runpy.run_module("pytest", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    main()
