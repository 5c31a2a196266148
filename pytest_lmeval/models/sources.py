"""From what a user has to a `Model` that steps: by a spec (`load`) or by the object itself (`as_model`).

    demo                       the shipped byte-level model
    zoo:NAME                   a reference model of this package
    hf:ID_OR_FOLDER            a transformers causal LM
    package.module:callable    whatever the callable returns: a torch module, or an object with `step`

A suffix sets the precision: @fp32 @bf16 @fp16, and with torchao @int8 @int4 for the weights. One that cannot be had is refused
(see `precision.py`). Each kind of model has its own file in this folder; which one drives an object is found out by looking at
it, once, here.
"""

from __future__ import annotations

import copy
import importlib
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytest_lmeval.errors import ModelError, SpecError
from pytest_lmeval.models.model import Model

ZOO = {  # a file of zoo/, and the function in it that makes the model
    "demo": "demo:load",
    "transformer": "transformer:load",
    "windowed": "transformer:load_windowed",
    "lstm": "lstm:load",
    "mamba": "mamba:load",
    "mamba2": "mamba2:load",
    "ttt": "ttt:load",
    "moshi": "moshi:load",
    "bk": "bk:load",
    "causal-bk": "bk:load_causal",
}
LOADED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Modules that specs have led to, and the precision that was given to them."""

FORMS = ("transformers", "moshi", "streaming", "step", "get_set_state", "functional", "stateless")


def load(spec: str, *, device: str | torch.device = "cpu", bits: int | None = None, trust_remote_code: bool = False) -> Model:
    """The model that `spec` names, in eval mode on `device`.

    bits               sets the precision where the spec has no suffix: 32, 16 (bfloat16), 8 or 4
    trust_remote_code  lets a model from the hub run its own code; never set it for a model that you do not know

    Raises SpecError if the spec names nothing, or the precision cannot be had.
    """
    from pytest_lmeval.models import huggingface, precision

    name, wanted = precision.split(spec, bits)
    shown = f"{name}@{wanted}" if wanted else name
    scheme, _, rest = name.partition(":")
    tokenizer, before = None, None
    if scheme == "hf" and rest:
        dtype = precision.DTYPES.get(wanted)
        loaded, tokenizer, before = huggingface.read(rest, spec=shown, dtype=dtype, trust_remote_code=trust_remote_code)
    else:
        loaded = _named(name)
    if isinstance(loaded, nn.Module):
        loaded = _own(loaded, wanted, shown).to(device)
        if scheme == "hf" and wanted in precision.DTYPES:
            precision.refuse_kept(loaded, wanted, shown)  # was read so, but for what transformers keeps in float32
        elif wanted:
            before = precision.convert(loaded, wanted, shown)
    elif wanted:
        raise SpecError(f"{shown}: the precision of {type(loaded).__name__} cannot be set, since it is no torch module.")
    try:
        lm = as_model(loaded, spec=shown, tokenizer=tokenizer)
    except ModelError as error:
        if not wanted:
            raise
        raise SpecError(f"with its weights in {wanted}, {error}") from error
    return precision.proven(lm, wanted, bytes_before=before) if wanted else lm


def as_model(source: Any, *, spec: str | None = None, form: str | None = None, tokenizer: Any = None) -> Model:
    """What `source` is as a `Model`; a `Model` comes back as it is.

    source     a torch module, or any object with `step(input_ids, state) -> (logits, state)`
    form       one of FORMS, where looking at the object is not enough
    tokenizer  an object with `encode` (see `lm.Tokenizer`), `"bytes"`, or None: the object's own attribute `tokenizer`
               if it has one, and bytes if its vocabulary has exactly 256 entries

    Raises SpecError if it can be none of them, and ModelError if it returns something else than logits.
    """
    if isinstance(source, Model):
        return source
    from pytest_lmeval.models import huggingface, modules, moshi

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
    """The torch device that `auto|cpu|cuda[:N]|mps` means on this machine. Raises SpecError where there is none."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecError(f"unknown device {name!r}; devices are auto, cpu, cuda, cuda:N and mps.") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise SpecError(
            f"device {name!r} is not there: torch {torch.__version__} sees {there} device(s) of type {device.type!r}. "
            "Use auto, or install a torch build for your accelerator."
        )
    return device


def _own(module: nn.Module, wanted: str, spec: str) -> nn.Module:
    """The module, or a copy where it is to be converted and an earlier spec led to it: a callable may return one again."""
    before = LOADED.get(module, "")
    if before and before != wanted:
        raise SpecError(
            f"{spec}: it was asked for a model, and returned the one whose weights were made {before} before. They cannot be "
            "made as they were. Let it build a new one whenever it is called."
        )
    if wanted and module in LOADED and not before:
        module = copy.deepcopy(module)
    LOADED[module] = wanted
    return module


def _named(name: str) -> Any:
    """The object behind `demo`, `zoo:NAME` or `package.module:callable`."""
    if name == "demo":
        name = "zoo:demo"
    if name.startswith("zoo:"):
        if (model := name.removeprefix("zoo:")) not in ZOO:
            raise SpecError(f"{name} is not in the zoo; it holds {', '.join(ZOO)}.")
        name = f"pytest_lmeval.zoo.{ZOO[model]}"
    module_path, colon, attribute = name.partition(":")
    if not colon or not attribute or not all(part.isidentifier() for part in module_path.split(".")):
        raise SpecError(
            f"unknown model spec {name!r}. A spec is demo, zoo:NAME, hf:ID_OR_FOLDER or module.path:callable"
            + (f"; did you mean hf:{name}?" if Path(name).is_dir() or not colon else ".")
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # as `python -m` does: a user's model usually lies beside their tests
    try:
        module = importlib.import_module(module_path)
        build = getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{name}: cannot be imported ({error}). A spec is module.path:callable.") from error
    return build()
