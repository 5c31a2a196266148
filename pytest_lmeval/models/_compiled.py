"""Compile a model with torch.compile, where its spec asks for it: `hf:FOLDER,compile=True`.

What is compiled is the call of the module, with its hooks; the module itself is left as it is. So a copy of it, such as the
float64 reference of the laws or the one that is trained, is not compiled. `Model.compiled` is part of the fingerprint: compiled
code rounds otherwise.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pytest_lmeval import registry
from pytest_lmeval.errors import SpecError, described, nearest
from pytest_lmeval.models._failures import OUT_OF_MEMORY, failure_of
from pytest_lmeval.models._model import Model

RECOMPILES = 64  # of a function, after which torch runs it as it is: for one and several rows, tokens and kept logits
CALLING_FORWARD = ("transformers", "functional", "get_set_state", "stateless")  # forms


class CompiledCall:
    """A module whose call is compiled; everything else is that of the module."""

    def __init__(self, module: nn.Module, backend: str) -> None:
        limit = registry.accepted(torch.compile, recompile_limit=RECOMPILES)  # not in older versions of torch
        self.module, self.compiled = module, torch.compile(module, backend=backend, dynamic=True, **limit)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.compiled(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def compiled(lm: Model, backend: str) -> Model:
    """The model, compiled by this backend of torch.compile for any number of rows and tokens; it reads one token, so that what
    cannot be compiled is refused here. Raises SpecError for an unknown backend, for a form that does not call `forward`, and if
    the first compilation fails."""
    if lm.module is None or lm.rebuild is None or lm.form.partition(",")[0] not in CALLING_FORWARD:
        raise SpecError(
            f"{lm.spec}: what is compiled is the call of a torch module, and a model of the form {lm.form!r} is stepped by "
            "another method. Compile that inside of the model, and leave compile= out."
        )
    _import(backend, lm.spec)
    call: Any = CompiledCall(lm.module, backend)
    found = replace(lm, step_fn=lm.rebuild(call), compiled=backend)
    try:
        with torch.no_grad():
            found.step(found.random_ids(1, 1))
    except Exception as error:
        if failure_of(error) == OUT_OF_MEMORY:
            raise
        raise SpecError(f"{lm.spec} cannot be compiled: {_why(error)}. Leave compile= out to run it as it is.") from error
    return found


def _import(backend: str, spec: str) -> None:
    """Import the compiler, whose modules warn of what torch itself does. Raises SpecError for an unknown backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamo: Any = importlib.import_module("torch._dynamo")
        if backend == "inductor":
            importlib.import_module("torch._inductor.compile_fx")
    known = dynamo.list_backends(None)
    if backend not in known:
        raise SpecError(
            f"{spec}: torch.compile has no backend {backend!r} here; there are: {', '.join(known)}.{nearest(backend, known)} "
            "compile=True takes inductor."
        )


def _why(error: Exception) -> str:
    """What is missing, or the first line of the error that a backend raised."""
    error = getattr(error, "inner_exception", error)
    if type(error).__name__ == "InvalidCxxCompiler":
        return "inductor, the backend of compile=True, needs a C++ compiler, and none was found: install g++, or name it in CXX"
    return described(error)
