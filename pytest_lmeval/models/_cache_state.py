"""Hold the cache of a transformers model as a state, and read several sequences in one row of it.

A mask [1, 1, t, s] says what each token sees, instead of the causal one that transformers would make. Models with windows,
recurrent layers or masks of their own misread it: the law `packed` finds that out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pytest_lmeval.errors import ModelError
from pytest_lmeval.models._model import Packing, State

PACKED_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}


@dataclass
class CacheState:
    """The model's cache and the number of tokens that it has read (the next position)."""

    cache: Any
    seen: int


def packing_of(module: Any) -> Packing:
    """The packing of a model whose `forward` has PACKED_ARGUMENTS."""
    return Packing(partial(_step, module), _take, _join)


def _step(
    module: Any, input_ids: Tensor, state: CacheState | None, positions: Tensor, visible: Tensor, wanted: Tensor, more: bool
) -> tuple[Tensor, State]:
    """See `Packing.step`."""
    cache = None if state is None else state.cache
    if cache is not None and not more:  # layers append to themselves by making new tensors
        cache = copy.copy(cache)
        cache.layers = [copy.copy(layer) for layer in _plain_layers(cache)]
    output = module(
        input_ids=input_ids,
        attention_mask=_mask(module, visible),
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=more,
        logits_to_keep=wanted,
    )
    return output.logits[0], CacheState(output.past_key_values, visible.shape[-1]) if more else None


def _mask(module: Any, visible: Tensor) -> Any:
    """What transformers takes for a mask [t, s] of one row."""
    t, s = visible.shape
    if module.config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(lambda b, h, q, k: visible[q, k], None, None, t, s, device=visible.device)
    mask = torch.zeros(1, 1, t, s, dtype=module.dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(module.dtype).min)


def _plain_layers(cache: Any) -> list[Any]:
    """The layers of a cache. Raises ModelError if one does not hold keys and values of every token."""
    from transformers.cache_utils import DynamicLayer

    if other := [type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer]:
        raise ModelError(f"a layer of its cache is a {other[0]}, which does not hold keys and values of every token")
    layers: list[Any] = cache.layers
    return layers


def _take(state: CacheState, columns: Tensor) -> CacheState:
    return _with_layers(state.cache, [_plain_layers(state.cache)], lambda parts: parts[0].index_select(-2, columns))


def _join(states: Sequence[CacheState]) -> CacheState:
    return _with_layers(states[0].cache, [_plain_layers(state.cache) for state in states], lambda parts: torch.cat(parts, -2))


def _with_layers(cache: Any, layers: list[list[Any]], change: Callable[[list[Tensor]], Tensor]) -> CacheState:
    """A cache like the first, whose layers hold what `change` makes of the keys of a layer in each cache, and of the values."""
    new = copy.copy(cache)
    new.layers = []
    for same in zip(*layers, strict=True):
        layer = copy.copy(same[0])
        layer.keys, layer.values = change([one.keys for one in same]), change([one.values for one in same])
        new.layers.append(layer)
    return CacheState(new, new.layers[0].keys.shape[-2])
