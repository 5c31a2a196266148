"""An edited helper makes another model, the same in every process, for which nothing that was saved counts."""

import functools
import importlib
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reading import measure_task
from tiny_models import VOCAB, Functional

from pytest_lmeval import Choices, Task, as_model, load
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._source_code import code_digest, project_files
from pytest_lmeval.training import Protocol, run_training

HERE = Path(__file__).parent


def write(folder, files):
    """Write files, named by their paths without `.py`."""
    for name, text in files.items():
        path = folder / (name if Path(name).suffix else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that writes the files of a user's project and imports one of its modules anew, as another process would."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def forget():
        for name in {
            name for name in set(sys.modules) - before if str(tmp_path) in str(getattr(sys.modules[name], "__file__", ""))
        }:
            del sys.modules[name]
        importlib.invalidate_caches()

    def imported(files, name="model"):
        write(tmp_path, files)
        forget()
        return importlib.import_module(name)

    imported.path = tmp_path
    yield imported
    forget()


# -------------------------------------------------------------------------------------------- the files


IMPORTS = {
    "a module beside it": ("import helpers", {"helpers"}),
    "a name of one": ("from helpers import f", {"helpers"}),
    "a submodule": ("import pkg.inner", {"pkg/__init__", "pkg/inner"}),
    "a submodule by from": ("from pkg import inner as i", {"pkg/__init__", "pkg/inner"}),
    "a name of a submodule": ("from pkg.inner import *", {"pkg/__init__", "pkg/inner"}),
    "a package's own imports": ("import facade", {"facade/__init__", "facade/hidden"}),
    "in a function": ("def step():\n    if step:\n        from helpers import f", {"helpers"}),
    "transitively": ("import chain", {"chain", "helpers"}),
    "in a circle": ("import turn", {"turn", "other_turn"}),
    "a package without __init__": ("from loose.part import f", {"loose/part"}),
    "in the folder src": ("import sourced", {"src/sourced"}),
    "an installed one": ("import torch, json, numpy.linalg, installed", set()),
    "one that is not there": (f"import nothing.here; from . import nobody; from {'.' * 99} import above", set()),
}
FILES = {
    "helpers": "",
    "pkg/__init__": "",
    "pkg/inner": "",
    "pkg/unrelated": "",
    "facade/__init__": "from . import hidden",
    "facade/hidden": "",
    "chain": "import helpers, os",
    "turn": "import other_turn",
    "other_turn": "from turn import f",
    "loose/part": "",
    "src/sourced": "",
    "lib/site-packages/installed": "",
    "unrelated": "",
}


@pytest.mark.parametrize("how", IMPORTS)
def test_the_modules_that_a_file_imports_are_found(tmp_path, monkeypatch, how):
    text, expected = IMPORTS[how]
    write(tmp_path, {**FILES, "model": text})
    monkeypatch.syspath_prepend(tmp_path / "lib" / "site-packages")
    found = project_files(tmp_path / "model.py") - {tmp_path / "model.py"}
    assert {path.relative_to(tmp_path).with_suffix("").as_posix() for path in found} == expected


def test_relative_imports_and_those_from_elsewhere_in_the_project_are_found(tmp_path, monkeypatch):
    deep = "from . import beside\nfrom ..above import f\nfrom ... import top\nimport at_the_top, on_the_path"
    files = {"a/__init__": "", "a/top": "", "a/b/__init__": "", "a/b/above": "", "a/b/c/__init__": "", "a/b/c/beside": ""}
    write(tmp_path, {**files, "a/b/c/model": deep, "at_the_top": "", "../other/on_the_path": ""})
    path = tmp_path / "a" / "b" / "c" / "model.py"
    assert {file.stem for file in project_files(path)} == {"model", "beside", "above", "top", "at_the_top", "__init__"}
    monkeypatch.syspath_prepend(tmp_path.parent / "other")
    assert "on_the_path" in {file.stem for file in project_files(path)}


def test_the_project_ends_where_a_file_says_so_and_the_nearest_module_of_a_name_is_always_found(tmp_path, monkeypatch):
    write(tmp_path, {"shared": "", "models/net/model": "import shared"})
    path = tmp_path / "models" / "net" / "model.py"
    assert project_files(path) == {path}
    write(tmp_path, {"pyproject.toml": ""})
    assert project_files(path) == {path, tmp_path / "shared.py"}
    write(tmp_path, {"tests/shared": ""})
    monkeypatch.syspath_prepend(tmp_path / "tests")  # as pytest does for a test file there, if it is collected
    assert project_files(path) == {path, tmp_path / "shared.py"}


def test_a_file_that_is_no_python_imports_nothing(tmp_path):
    write(tmp_path, {"model": "import helpers\nprint 'old'", "helpers": "", "escaped": "import helpers\nx = '\\d'"})
    assert len(project_files(tmp_path / "model.py")) == 1
    assert len(project_files(tmp_path / "escaped.py")) == 2


# -------------------------------------------------------------------------------------------- the model


NET = """
    from tiny_models import Functional
    from helpers import scaled

    class Net(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return scaled(logits), state
"""
HELPERS = "def scaled(logits):\n    return logits * {by}\n"


def net(project, by=1, **more):
    return project({"model": NET, "helpers": HELPERS.format(by=by), **more}).Net()


def test_an_edited_helper_makes_another_model_and_an_unrelated_file_does_not(project):
    found = [fingerprint(as_model(net(project, by))) for by in (1, 2, 1)]
    assert found[0] == found[2] != found[1]
    assert fingerprint(as_model(net(project, 1, unrelated="x = 1"))) == found[0]
    own = Path(project.path / "model.py").read_bytes()
    net(project, 2)
    assert own == Path(project.path / "model.py").read_bytes()  # the file of the class alone does not tell


def test_the_fingerprint_is_the_same_in_every_process(project, tmp_path):
    expected = fingerprint(as_model(net(project)))
    program = "import sys; sys.path[:0] = {!r}; {}; print(fingerprint(as_model(model.Net())))"
    path = [str(tmp_path), str(HERE)]
    asked = "from pytest_lmeval import as_model; from pytest_lmeval.models._identity import fingerprint"
    for first in (
        f"import model; {asked}",
        f"import helpers, tiny_models; {asked}; fingerprint(as_model(tiny_models.Functional())); import model",
    ):
        command = [sys.executable, "-c", program.format(path, first)]
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        ran = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=True)
        assert ran.stdout.split()[-1] == expected


BUILDER = """
    import functools
    import torch
    from tiny_models import Functional, Stepper
    from helpers import scaled

    def build():
        return Functional()

    def with_hook():
        lm = Functional()
        lm.register_forward_hook(lambda module, given, found: (scaled(found[0]), found[1]))
        return lm

    class Steps(Stepper):
        fingerprint = "v1"

        def step(self, input_ids, state=None):
            logits, state = super().step(input_ids, state)
            return scaled(logits), state
"""


@pytest.mark.parametrize("name", ["build", "with_hook", "Steps"])
def test_helpers_of_what_builds_or_wraps_a_model_count(project, name):
    found = []
    for by in (1, 2, 1):
        built = project({"model": BUILDER, "helpers": HELPERS.format(by=by)})
        lm = as_model(getattr(built, name)()) if name == "with_hook" else load(f"model:{name}")
        found.append(fingerprint(lm))
    assert found[0] == found[2] != found[1]


def test_the_code_of_a_users_step_function_counts(project):
    found, module, code = [], Functional(), "from helpers import scaled\ndef step_fn(ids, state, keep): ..."
    for by in (1, 2, 1):
        step_fn = project({"model": code, "helpers": HELPERS.format(by=by)}).step_fn
        found.append(fingerprint(Model(step_fn, "mine", "step", True, VOCAB, module=module)))
    assert found[0] == found[2] != found[1]


def multiplied(by, module=None):
    def forward(input_ids, state=None):
        logits, state = Functional.forward(module, input_ids, state)
        return logits * by, state

    return forward


def other(module, given, found):
    return found


@dataclass
class Config:
    heads: int = 1
    names: tuple[str, ...] = ("a",)


SETTINGS = {
    "a private attribute": lambda lm: setattr(lm, "_scale", 2.0),
    "a dtype": lambda lm: setattr(lm, "computes_in", torch.bfloat16),
    "a list": lambda lm: setattr(lm, "dilations", [1, 2, 4]),
    "another list": lambda lm: setattr(lm, "dilations", [1, 2, 8]),
    "a dataclass": lambda lm: setattr(lm, "config", Config()),
    "a field of it": lambda lm: setattr(lm, "config", Config(names=("b",))),
    "a namespace": lambda lm: setattr(lm, "config", SimpleNamespace(heads=1, table=torch.ones(3))),
    "a function": lambda lm: setattr(lm, "forward", multiplied(1, lm)),
    "what a function closes over": lambda lm: setattr(lm, "forward", multiplied(2, lm)),
    "a partial": lambda lm: setattr(lm, "forward", functools.partial(multiplied, 2)),
    "an argument of it": lambda lm: setattr(lm, "forward", functools.partial(multiplied, 3)),
    "a hook": lambda lm: lm.head.register_forward_hook(other),
}


def test_every_setting_counts():
    found = [fingerprint(as_model(Functional()))]
    for _ in range(2):
        for change in SETTINGS.values():
            lm = as_model(Functional())
            change(lm.module)
            found.append(fingerprint(lm))
    count = len(SETTINGS)
    assert found[1 : 1 + count] == found[1 + count :]
    assert len(set(found)) == 1 + count


def test_what_reading_changes_is_no_setting():
    class Busy(Functional):
        def __init__(self):
            super().__init__()
            self.cache, self._lengths, self._calls = {"last": None}, [], 0

        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            self.cache["last"] = logits
            self._lengths.append(input_ids.shape[1])
            self._calls += 1
            return logits, state

    lm = as_model(Busy())
    before = fingerprint(lm)
    lm.step(torch.arange(9)[None])
    assert fingerprint(lm) == before == fingerprint(as_model(Busy()))


def test_what_a_function_assigns_to_is_none_of_its_settings():
    def counting(start):
        calls = start

        def hook(module, given, found):
            nonlocal calls
            calls += 1

        return hook

    assert code_digest([counting(1)]) == code_digest([counting(2)])
    assert code_digest([multiplied(1)]) != code_digest([multiplied(2)])
    assert code_digest([functools.cache(multiplied(1))]) != code_digest([functools.cache(multiplied(2))])
    spaces = [{}, {}]
    for space, by in zip(spaces, (1, 2), strict=True):
        exec(f"def typed(text):\n    return len(text) == {by}", space)  # without a source file, as in a notebook
    assert code_digest([spaces[0]["typed"]]) != code_digest([spaces[1]["typed"]])


# -------------------------------------------------------------------------------------------- what is saved


def test_a_trained_model_is_not_that_of_an_edited_helper(project, tmp_path):
    ids = np.random.default_rng(0).integers(0, VOCAB, 600)
    protocol = Protocol(steps=2, batch_size=2, seq_len=16)

    def cached(by):
        return run_training(
            as_model(net(project, by)), ids, held_out=ids[::-1], protocol=protocol, folder=tmp_path / "out"
        ).cached

    assert [cached(1), cached(1), cached(2), cached(2), cached(1)] == [False, True, False, True, True]


def test_answers_and_results_are_not_those_of_an_edited_helper(project, tmp_path):
    def resumed(by):
        lm = as_model(net(project, by), tokenizer="bytes")
        task = Task("t", [{"text": text} for text in "\x05\x06\x07"], lambda row: Choices(row["text"], ("\x01", "\x02"), 0))
        return measure_task(lm, task, kept=tmp_path / "p").resumed

    def key(by):
        return VerbContext().key("perplexity", as_model(net(project, by)), {})

    assert [resumed(by) for by in (1, 1, 2, 1)] == [0, 3, 0, 3]
    assert key(1) == key(1) != key(2)
