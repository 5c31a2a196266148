"""Measure a model in a process of its own, without what this one holds: other models, data, freed memory of the allocator.

The child is a fresh interpreter with this process's module search path, number of threads, environment and folder; it imports
no `conftest.py`. It loads the model by its spec where that names the same weights again, else by pickle. Request and answer are
files in a temporary folder, so that nothing the model prints disturbs them.
"""

from __future__ import annotations

import importlib
import json
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch

from pytest_lmeval.errors import ChildFailed, ModelError, OutOfMemory
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._sources import FORMS, as_model, load

TIMEOUT = 600.0  # seconds
LAST_LINES, FRAMES = 12, 2  # of the child's output, and of its traceback
BEGIN = (
    "import json, sys\n"
    "with open(sys.argv[1] + '/request.json', encoding='utf-8') as file:\n"
    "    sys.path[:] = json.load(file)['path']\n"
    "from pytest_lmeval.profiling._child import main\n"
    "main(sys.argv[1])\n"
)
Start = Callable[[str, float], tuple[int, bytes]]


class CannotMoveError(Exception):
    """The model cannot be loaded in another process, and why."""


def start_process(folder: str, timeout: float) -> tuple[int, bytes]:
    """Run a child on the request in the folder; its exit status and output. Raises subprocess.TimeoutExpired and OSError."""
    command, output = [sys.executable, "-c", BEGIN, folder], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=timeout, check=False, **output)  # type: ignore[call-overload]
    return done.returncode, done.stdout


def in_child(
    lm: Model,
    function: Callable[..., Any],
    settings: dict[str, Any],
    *,
    timeout: float = TIMEOUT,
    start: Start = start_process,
) -> tuple[Any, str]:
    """`function(lm, **settings)` in a process of its own, and how the model got there.

    function  at the top level of a module; what it returns must be JSON
    timeout   seconds, after which the child is ended
    start     (folder, timeout) -> (exit status, output): runs `answer(folder)` in another process

    Raises CannotMoveError if the child cannot load the model, OutOfMemory, and ChildFailed for any other failure.
    """
    request = {
        "path": [entry for entry in sys.path if isinstance(entry, str)],
        "threads": torch.get_num_threads(),
        "function": [function.__module__, function.__qualname__],
        "settings": settings,
        "name": lm.spec,
        "form": lm.form,
        "vocab_size": lm.vocab_size,
        "context_length": None if lm.context_length is None else int(lm.context_length),
    }
    refused = ""
    if _names_weights(lm):
        try:
            by_spec = {"spec": lm.spec, "fingerprint": fingerprint(lm)}
            return _ask(lm, {**request, **by_spec}, timeout, start), f"a child, loaded by its spec {lm.spec}"
        except CannotMoveError as error:
            refused = f"{error} "
    try:
        return _ask(lm, request, timeout, start), f"a child, {refused and refused + 'It was '}moved there by pickle"
    except CannotMoveError as error:
        raise CannotMoveError(f"{refused}{error}") from None


def _names_weights(lm: Model) -> bool:
    """Whether the model can be loaded by its spec, which may be made up from the class of an object."""
    made_up = {f"{type(own).__module__}:{type(own).__qualname__}" for own in (lm.source, lm.module)}
    name = lm.spec.partition("@")[0]
    return lm.module is not None and (name == "demo" or ":" in name) and lm.spec not in made_up and " " not in lm.spec


def _ask(lm: Model, request: dict[str, Any], timeout: float, start: Start) -> Any:
    with tempfile.TemporaryDirectory(prefix="lmeval-") as name:
        folder = Path(name)
        if "spec" not in request:
            try:
                torch.save(lm.source if lm.module is None else lm.module, folder / "model.pt")
            except Exception as error:  # noqa: BLE001 - a class defined in a function, an open file, the user's __reduce__
                raise CannotMoveError(f"It cannot be pickled ({type(error).__name__}: {first_line(error)}).") from None
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        try:
            status, output = start(name, timeout)
        except subprocess.TimeoutExpired as error:
            raise ChildFailed(
                f"{lm.spec} was measured in a process of its own, which took longer than {timeout:g} s and was ended."
                f"{_last(error.stdout)}Give it more time (timeout=...), or fewer rows or tokens."
            ) from None
        except OSError as error:
            raise CannotMoveError(f"No process can be started here ({error}).") from None
        return _answer(lm, folder, status, output)


def _answer(lm: Model, folder: Path, status: int, output: bytes) -> Any:
    answered = folder / "answer.json"
    if status == 0 and answered.exists():
        answer = json.loads(answered.read_text(encoding="utf-8"))
        if "cannot_move" in answer:
            raise CannotMoveError(answer["cannot_move"])
        if "out_of_memory" in answer:
            raise OutOfMemory(answer["out_of_memory"], answer["wanted"])
        if "model_error" in answer:
            raise ModelError(answer["model_error"])
        return answer["found"]
    if status == -signal.SIGKILL:
        if not (folder / "loaded").exists():
            raise CannotMoveError("A child process was killed while it loaded the model, as for lack of memory.")
        raise OutOfMemory(
            f"{lm.spec} was measured in a process of its own, which was killed (signal 9), as the system does when memory runs "
            f"out.{_last(output)}Take fewer rows (batch_size) or tokens (seq_len)."
        )
    raise ChildFailed(
        f"{lm.spec} was measured in a process of its own, which ended with exit status {status} and no answer."
        f"{_last(output)}To debug it, measure in this process: apart=False."
    )


def _last(output: bytes | None) -> str:
    """The end of the child's output, for the middle of a message."""
    lines = (output or b"").decode(errors="replace").strip().splitlines()
    return "\nIts last lines:\n" + "".join(f"    {line}\n" for line in lines[-LAST_LINES:]) if lines else " It wrote nothing. "


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


# ------------------------------------------------------------------------------------------- inside of the child


class WithoutConftest(MetaPathFinder):
    """Refuse to import a conftest.py: pytest imports it, in the process of the tests."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.rpartition(".")[2] == "conftest":
            raise ImportError("its class comes from a conftest.py, which only the process of the tests imports")


def main(name: str) -> None:
    """Answer in a process that does nothing else. Where memory runs out, Linux ends this process and not that of the tests."""
    sys.meta_path.insert(0, WithoutConftest())
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")
    answer(name)


def answer(name: str) -> None:
    """Do what the request in the folder `name` asks for, and write the answer into it."""
    folder = Path(name)
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    try:
        lm = _load(request, folder)
    except Exception as error:  # noqa: BLE001 - loading runs the user's code
        found = {"cannot_move": f"It cannot be loaded again ({type(error).__name__}: {first_line(error)})."}
    else:
        (folder / "loaded").touch()
        found = _measure(lm, request)
    (folder / "answer.json").write_text(json.dumps(found), encoding="utf-8")


def _load(request: dict[str, Any], folder: Path) -> Model:
    if "spec" in request:
        lm = replace(load(request["spec"]), context_length=request["context_length"])
        if fingerprint(lm) != request["fingerprint"]:
            raise ValueError("its spec names other weights than it has")
        return lm
    source = torch.load(folder / "model.pt", map_location="cpu", weights_only=False)  # the parent has just written it
    form = request["form"]
    lm = as_model(source, spec=request["name"], form=form if form in FORMS else None)
    if (lm.form, lm.vocab_size) != (form, request["vocab_size"]):
        raise pickle.PickleError(f"moved by pickle, it is driven as {lm.form!r}, and not as {form!r}")
    return replace(lm, context_length=request["context_length"])


def _measure(lm: Model, request: dict[str, Any]) -> dict[str, Any]:
    module, function = request["function"]
    try:
        return {"found": getattr(importlib.import_module(module), function)(lm, **request["settings"])}
    except OutOfMemory as error:
        return {"out_of_memory": str(error), "wanted": error.wanted}
    except ModelError as error:
        return {"model_error": str(error)}
    except Exception:  # noqa: BLE001 - the parent shows the last lines of the output
        traceback.print_exc(limit=-FRAMES)
        raise SystemExit(1) from None
