"""Carry another KV cache than the model's own: a static one, of a fixed length, or a quantized one (`cache=` of a spec).

The cache is part of the form of the model, and so of its fingerprint. The laws are tried on it like on any other, so that one
whose numbers depend on how the text is cut, as those of a quantized cache do, gets that verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pytest_lmeval.errors import SpecError, described
from pytest_lmeval.models._model import Model, StepFn
from pytest_lmeval.models._spec_options import STATIC_LENGTH, CacheChoice


def with_cache(lm: Model, wanted: CacheChoice) -> Model:
    """The model, whose first step makes the cache that is wanted; one step is taken, so that what cannot be had is refused.

    A static cache holds so many tokens: that is then the context length. Raises SpecError for a model without the cache.
    """
    from pytest_lmeval.models._hf_stepping import step_with_cache

    shown = f"cache={wanted.kind}"
    if lm.form != "transformers":
        raise SpecError(f"{lm.spec}: {shown} needs a model of transformers whose cache is passed to it; its form is {lm.form}.")
    length = _length(lm, wanted) if wanted.kind == "static" else None

    def rebuild(module: nn.Module) -> StepFn:
        return step_with_cache(module, make_cache=_maker(module, wanted, length))

    told = f"static cache of {length} tokens" if length else f"quantized cache ({wanted.backend})"
    assert lm.module is not None
    found = replace(
        lm,
        step_fn=rebuild(lm.module),
        rebuild=rebuild,
        form=f"{lm.form}, {told}",
        context_length=length or lm.context_length,
        loaded=(*lm.loaded, ("cache", told)),
    )
    try:
        with torch.no_grad():
            _, state = found.step(found.random_ids(1, 2))
            found.step(found.random_ids(1, 1), state)
    except Exception as error:
        raise SpecError(
            f"{lm.spec}: {type(lm.module).__name__} cannot be read with a {told}: {described(error)}. Leave cache= out to use "
            "the model's own."
        ) from error
    return found


def _length(lm: Model, wanted: CacheChoice) -> int:
    """The tokens that a static cache holds. Raises SpecError for more than the model reads, and for fewer than two."""
    if wanted.length is None:
        return min(lm.context_length or STATIC_LENGTH, STATIC_LENGTH)
    if wanted.length < 2:
        raise SpecError(f"{lm.spec}: a static cache of {wanted.length} token(s) holds no text to predict; write 2 or more.")
    if lm.context_length and wanted.length > lm.context_length:
        raise SpecError(
            f"{lm.spec}: a static cache of {wanted.length} tokens is more than the {lm.context_length} that the model reads. "
            f"Write cache=static:{lm.context_length} or less."
        )
    return wanted.length


def _maker(module: nn.Module, wanted: CacheChoice, length: int | None) -> Callable[[], Any]:
    """What makes an empty cache for the module."""
    from transformers import QuantizedCache, StaticCache

    config: Any = module.config
    if length is not None:
        return lambda: StaticCache(config=config, max_cache_len=length)
    return lambda: QuantizedCache(backend=wanted.backend, config=config)
