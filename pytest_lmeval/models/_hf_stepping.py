"""Step transformers causal LMs, with every kind of cache.

The model makes its own cache in the first step, unless another is asked for (`_caches`): one made without the configuration
would not know which layers have windows. Positions are always passed, since some models restart them with each chunk.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lmeval.errors import ModelError
from pytest_lmeval.models._cache_state import PACKED_ARGUMENTS, CacheState, packing_of
from pytest_lmeval.models._huggingface import HFTokenizer
from pytest_lmeval.models._model import Model, State, StepFn, devices_note, tokenizer_for

CACHE_NAMES = ("past_key_values", "cache_params", "state")  # the last two: Mamba and its relatives, RWKV
CONTEXT_LENGTHS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
BOUNDARIES = (
    "sliding_window",
    "attention_chunk_size",
    "chunk_size",
    "mamba_chunk_size",
    "conv_kernel",
    "mamba_d_conv",
    "conv_L_cache",
)


def is_transformers(source: Any) -> bool:
    """Whether `source` is a transformers model; does not import transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(source, transformers.PreTrainedModel)


def adapt(module: nn.Module, *, spec: str, tokenizer: Any = None) -> Model:
    config: Any = module.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if hasattr(tokenizer, "bos_token_id"):
        tokenizer = HFTokenizer(tokenizer, spec)
    first_token = torch.zeros(1, 1, dtype=torch.long, device=next(module.parameters()).device)
    if isinstance(tokenizer, HFTokenizer):
        tokenizer = copy.copy(tokenizer)  # `ends` differs by model, and several models may share one tokenizer
        named = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
        ends = (tokenizer.eos, *named) if isinstance(named, list | tuple) else (tokenizer.eos, named)
        tokenizer.ends = tuple(dict.fromkeys(end for end in ends if isinstance(end, int)))
    form, state = "transformers", None
    with torch.no_grad():
        try:
            logits, state = step_with_cache(module)(first_token, None, None)
        except Exception as error:  # noqa: BLE001 - without its cache, the model can still be scored in windows
            try:
                logits, _ = step_without_cache(module)(first_token, None, None)
            except Exception:  # noqa: BLE001 - the first error says more
                raise ModelError(
                    f"{spec} ({type(module).__name__}) raised {type(error).__name__} for one token (id 0, shape [1, 1]): "
                    f"{error}.{devices_note(module)}"
                ) from error
            form = f"transformers, without its cache, which raised {type(error).__name__}: {error}"
    stateful = state is not None
    rebuild = step_with_cache if stateful else step_without_cache
    sizes, lengths = ([getattr(text_config, name, None) for name in names] for names in (BOUNDARIES, CONTEXT_LENGTHS))
    return Model(
        rebuild(module),
        spec,
        form=form,
        stateful=stateful,
        vocab_size=logits.shape[-1],
        module=module,
        rebuild=rebuild,
        tokenizer=tokenizer_for(tokenizer, logits.shape[-1]),
        context_length=next((n for n in lengths if isinstance(n, int) and n > 0), None),  # others mean no limit
        boundaries=tuple(sorted({n for n in sizes if isinstance(n, int) and n > 1})),
    )


def step_with_cache(module: nn.Module, make_cache: Callable[[], Any] | None = None) -> StepFn:
    """The step of a module that returns its cache.

    make_cache  makes the empty cache that the first step is given; None: the module makes its own
    """
    accepted = inspect.signature(module.forward).parameters
    names = [name for name in CACHE_NAMES if name in accepted]

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        seen = 0 if state is None else state.seen
        positions = input_ids.shape[-1]
        arguments: dict[str, Any] = {"use_cache": True}
        if "position_ids" in accepted:
            arguments["position_ids"] = torch.arange(seen, seen + positions, device=input_ids.device)[None]
        if keep and "logits_to_keep" in accepted:  # transformers takes 0 for all
            arguments["logits_to_keep"] = keep
        if state is not None or make_cache is not None:
            arguments[names[0]] = make_cache() if state is None else state.cache  # type: ignore[misc]
        output = module(input_ids=input_ids, **arguments)
        cache = next((c for name in names if (c := getattr(output, name, None)) is not None), None)
        return output.logits, None if cache is None else CacheState(cache, seen + positions)

    if accepted.keys() >= PACKED_ARGUMENTS and make_cache is None:
        step_fn.packing = packing_of(module)  # type: ignore[attr-defined]
    return step_fn


def step_without_cache(module: nn.Module) -> StepFn:
    """For models that return no cache or keep their state inside: each call reads a new sequence."""

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        if state is not None:
            raise ModelError(f"{type(module).__name__} has no cache to continue.")
        return module(input_ids=input_ids, use_cache=False).logits, None

    return step_fn
