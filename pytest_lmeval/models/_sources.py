"""Make a `Model` from a spec (`load`) or from a module or another object (`as_model`).

    demo                       the shipped byte-level model
    zoo:NAME                   a reference model of this package
    hf:ID_OR_FOLDER            a transformers causal LM
    server:URL                 the model behind an address (vLLM, SGLang, llama.cpp, OpenAI-compatible)
    package.module:callable    whatever the callable returns

All but the last are functions in the registry (group `models`), called with the text behind the colon, if there is one, and
with those of the keywords `spec`, `dtype` (the precision of the spec), `trust_remote_code`, `device`, `concurrency` and the
options of their specs that they have parameters for. They return a torch module, an object with `step`, a `Model`, or `Loaded`.
A suffix @PRECISION sets that of the weights (of a server, it says which one it has); the options
`cache` and `compile` choose the KV cache, and compile the model.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytest_lmeval import registry
from pytest_lmeval.errors import ModelError, SpecError, nearest
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._model import Model

__all__ = ["FORMS", "Loaded", "as_model", "load", "resolve_device"]

FORMS = ("transformers", "moshi", "streaming", "step", "get_set_state", "functional", "stateless")

_converted: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # modules of `load` -> precision


@dataclass(frozen=True)
class Loaded:
    """Returned by a model source instead of a model, to add facts.

    module          a torch module, or an object with `step`
    tokenizer       see `as_model`
    bytes_before    size of the saved tensors, if the source loaded them in another precision
    unused_weights  names of saved tensors that the module has no place for
    facts           what was loaded and how, for the record: `adapter`, `revision`, ...
    placed          whether its tensors lie where they must, and are not to be moved
    """

    module: Any
    tokenizer: Any = None
    bytes_before: int | None = None
    unused_weights: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    placed: bool = False


def load(
    spec: str,
    *,
    device: str | torch.device = "cpu",
    bits: int | None = None,
    trust_remote_code: bool = False,
    concurrency: int | None = None,
) -> Model:
    """Load the model that `spec` names, in eval mode, on `device`.

    device             auto, cpu, cuda, cuda:N or mps
    bits               the precision if the spec has no suffix: 32, 16 (bfloat16), 8 or 4
    trust_remote_code  lets a model from the hub run its own code; set it only for models that you know
    concurrency        requests to a server at once

    Raises SpecError for an unknown spec, a precision that the model cannot have, and a model that cannot be compiled;
    RegistryError if two packages register it.
    """
    from pytest_lmeval.models._caches import with_cache
    from pytest_lmeval.models._compiled import compiled

    parsed = specs.parse(spec, bits)
    if concurrency is not None and concurrency < 1:
        raise SpecError(f"{spec}: concurrency={concurrency}; a server is asked at least 1 request at once.")
    given = {"trust_remote_code": trust_remote_code, "concurrency": concurrency}
    lm = _loaded(parsed, resolve_device(device) if isinstance(device, str) else device, given)
    if cache := parsed.options.get("cache"):
        lm = with_cache(lm, cache)
    backend = parsed.options.get("compile")
    return compiled(lm, backend) if backend else lm


def _loaded(spec: specs.Spec, device: torch.device, given: dict[str, Any]) -> Model:
    """The model of a spec, on the device, in its precision.

    given  keywords for its source, beside those of the spec
    """
    from pytest_lmeval.models import _precision as precision

    name, wanted, shown = spec.name, spec.precision, str(spec)
    dtype = precision.DTYPES.get(wanted)
    found, source, has_dtype = _from_source(name, dtype, {"spec": shown, "device": device, **given, **spec.options})
    loaded = found if isinstance(found, Loaded) else Loaded(found)
    module, before = loaded.module, loaded.bytes_before
    if isinstance(module, nn.Module):
        module = _own(module, wanted, shown)
        module = module if loaded.placed else module.to(device)
        if has_dtype:
            precision.refuse_kept(module, wanted, shown)  # loaded so, except what the source keeps in float32
        elif wanted:
            before = precision.convert(module, wanted, shown)
    elif wanted and not (isinstance(module, Model) and module.served is not None and has_dtype):
        raise SpecError(f"{shown}: the precision of {type(module).__name__} cannot be set, since it is no torch module.")
    if isinstance(module, Model):
        return replace(module, spec=shown, built_by=source)
    try:
        lm = as_model(module, spec=shown, tokenizer=loaded.tokenizer)
    except ModelError as error:
        if not wanted:
            raise
        raise SpecError(f"with its weights in {wanted}, {error}") from error
    lm = replace(lm, built_by=source, unused_weights=loaded.unused_weights, loaded=tuple(loaded.facts.items()))
    return precision.proven(lm, wanted, bytes_before=before) if wanted else lm


def as_model(source: Any, *, spec: str | None = None, form: str | None = None, tokenizer: Any = None) -> Model:
    """Adapt `source`; a `Model` is returned as it is.

    source     a torch module, or any object with `step(input_ids, state) -> (logits, state)`
    form       one of FORMS; None: found from its attributes and what it returns for one token
    tokenizer  an object with `encode` (see `_model.Tokenizer`), `"bytes"`, or None: its attribute `tokenizer`, if it has one,
               or bytes if its vocabulary has exactly 256 entries

    Raises SpecError for an unknown form or tokenizer, and ModelError if it is no model or returns no logits.
    """
    if isinstance(source, Model):
        return source
    from pytest_lmeval.models import _hf_stepping as huggingface, _modules as modules, _moshi as moshi

    spec = spec or f"{type(source).__module__}:{type(source).__qualname__}"
    if form is None:
        form = "transformers" if huggingface.is_transformers(source) else "moshi" if moshi.is_moshi(source) else None
    if form is not None and form not in FORMS:
        raise SpecError(f"{spec}: unknown form {form!r}; forms are {', '.join(FORMS)}.")
    if isinstance(source, nn.Module):
        source.eval()
    if form == "transformers":
        return huggingface.adapt(source, spec=spec, tokenizer=tokenizer)
    if form == "moshi":
        return moshi.adapt(source, spec=spec)
    return modules.adapt(source, spec=spec, form=form, tokenizer=tokenizer)


def resolve_device(name: str) -> torch.device:
    """The torch device that `auto|cpu|cuda[:N]|mps` names. Raises SpecError if this machine does not have it."""
    mps = torch.backends.mps.is_available()
    if name in ("auto", "cuda") and torch.cuda.is_available():
        of_rank = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()  # set by torchrun, on each machine from 0
        return torch.device("cuda", of_rank) if of_rank else torch.device("cuda")
    if name == "auto":
        return torch.device("mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        near = nearest(name, ("auto", "cpu", "cuda", "mps"))
        raise SpecError(f"unknown device {name!r}; devices are auto, cpu, cuda, cuda:N and mps.{near}") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise SpecError(
            f"device {name!r} is not there: torch {torch.__version__} sees {there} device(s) of type {device.type!r}. "
            "Use auto, or install a torch build for your accelerator."
        )
    return device


def _own(module: nn.Module, wanted: str, spec: str) -> nn.Module:
    """The module, or a copy if it is to be converted and an earlier `load` returned it: a callable may return it twice."""
    before = _converted.get(module, "")
    if before and before != wanted:
        raise SpecError(
            f"{spec}: its callable returned a module whose weights were converted to {before} before, which cannot be undone. "
            "Let it build a new module in each call."
        )
    if wanted and module in _converted and not before:
        module = copy.deepcopy(module)
    _converted[module] = wanted
    return module


def _from_source(name: str, dtype: torch.dtype | None, given: dict[str, Any]) -> tuple[Any, Any, bool]:
    """Call the registered or imported model source; return what it returns, itself, and whether it loaded in `dtype`."""
    if found := registry.resolve("models", name):
        source, rest = found
        options = registry.accepted(source, **given, **({} if dtype is None else {"dtype": dtype}))
    else:
        source, rest, options = _imported(name), None, {}
    arguments = () if rest is None else (rest,)
    try:
        inspect.signature(source).bind(*arguments, **options)
    except TypeError as error:
        behind = "nothing behind a colon" if rest is None else f"the text {rest!r} behind the colon"
        raise SpecError(f"{given['spec']}: its model source cannot be called with {behind}: {error}.") from error
    except ValueError:  # some functions written in C have no signature
        pass
    return source(*arguments, **options), source, "dtype" in options


def _imported(name: str) -> Any:
    """The object that `package.module:callable` names."""
    if not specs.is_module_path(name):
        raise specs.unknown(name)
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # as `python -m` does: the module is often beside the tests
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise specs.unknown(name, f", and it cannot be imported ({error})") from error
        raise SpecError(f"{name}: cannot be imported ({error}). A spec is module.path:callable.") from error
