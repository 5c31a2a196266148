"""transformers causal LMs, with every kind of cache.

The cache is called `past_key_values`, `cache_params` (Mamba and its relatives) or `state` (RWKV). It is
never made here: the model makes its own in the first step, as its configuration asks for (a cache made without the
configuration forgets that some layers have windows), and it is carried from then on. Positions are always given explicitly,
since some models restart them with each chunk, and no attention mask is given, since there is no padding.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pytest_lmeval.errors import ModelError, SpecError
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._model import Model, State, StepFn, places, tokenizer_for
from pytest_lmeval.models._sources import Loaded
from pytest_lmeval.models._tensors import nbytes

CACHE_NAMES = ("past_key_values", "cache_params", "state")
BOUNDARIES = (
    "sliding_window",
    "attention_chunk_size",
    "chunk_size",
    "mamba_chunk_size",
    "conv_kernel",
    "mamba_d_conv",
    "conv_L_cache",
)


@dataclass
class CacheState:
    """The model's cache and the number of tokens it has seen (the next position)."""

    cache: Any
    seen: int


def is_transformers(source: Any) -> bool:
    """Whether `source` is a transformers model; never imports transformers to find out."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(source, transformers.PreTrainedModel)


def load(name: str, *, spec: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Loaded:
    """A causal LM from a folder or the hub, from safetensors or weights that hold nothing but tensors, and its tokenizer.

    dtype  the precision to read it in, but for what transformers itself keeps in float32; None: that of the checkpoint

    `bytes_before` is that of the checkpoint, if a `dtype` is given and the checkpoint names its own.
    """
    specs.check_path(spec, name)
    try:
        import transformers
    except ImportError as error:
        raise SpecError(f"{spec} needs transformers: pip install 'pytest-lmeval[hf]'") from error
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        module = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        where = "is a folder here" if folder.is_dir() else "is no folder here, so it was looked up on the hub"
        raise SpecError(
            f"{spec} could not be loaded: {str(error).strip().splitlines()[0]} ({name!r} {where}.)"
            + ("" if folder.is_dir() else specs.nearest_folder(name))
        ) from error
    tokenizer: HFTokenizer | NoTokenizer
    try:
        tokenizer = HFTokenizer(transformers.AutoTokenizer.from_pretrained(source, **options), name)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        tokenizer = NoTokenizer(spec, error)
    saved = getattr(config, "dtype", None) if dtype and not getattr(config, "quantization_config", None) else None
    before = None
    if isinstance(saved, torch.dtype):  # it says nothing of buffers: they are tables that the model fills for itself
        before = sum(p.numel() * saved.itemsize for p in module.parameters()) + sum(map(nbytes, module.buffers()))
    return Loaded(module.train(False), tokenizer, before)


def adapt(module: nn.Module, *, spec: str, tokenizer: Any = None) -> Model:
    config: Any = module.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if hasattr(tokenizer, "bos_token_id"):
        tokenizer = HFTokenizer(tokenizer, spec)
    first_token = torch.zeros(1, 1, dtype=torch.long, device=next(module.parameters()).device)
    if isinstance(tokenizer, HFTokenizer):
        tokenizer = copy.copy(tokenizer)  # the ends are of this model, and another one may have been given the same tokenizer
        tokenizer.ends = _ends(module, tokenizer.eos)
    form, state = "transformers", None
    try:
        logits, state = _asked(step_with_cache(module), first_token)
    except Exception as error:  # noqa: BLE001 - a cache may fail in any way; without it, the model may still be read in windows
        try:
            logits, _ = _asked(step_without_cache(module), first_token)
        except Exception:  # noqa: BLE001 - what is told is why it failed as it is meant to be used
            raise ModelError(
                f"{spec} ({type(module).__name__}) was asked for the logits of one token (id 0, shape [1, 1]) and raised "
                f"{type(error).__name__}: {error}.{places(module)}"
            ) from error
        form = f"transformers, without its cache, which raised {type(error).__name__}: {error}"
    stateful = state is not None
    rebuild = step_with_cache if stateful else step_without_cache
    return Model(
        rebuild(module),
        spec,
        form=form,
        stateful=stateful,
        vocab_size=logits.shape[-1],
        module=module,
        rebuild=rebuild,
        tokenizer=tokenizer_for(tokenizer, logits.shape[-1]),
        context_length=_context_length(text_config),
        boundaries=tuple(
            sorted({n for name in BOUNDARIES if isinstance(n := getattr(text_config, name, None), int) and n > 1})
        ),
    )


def _ends(module: nn.Module, eos: int | None) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's own, and those that the model's settings for generation name."""
    named = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    listed = list(named) if isinstance(named, list | tuple) else [named]
    return tuple(dict.fromkeys(end for end in (eos, *listed) if isinstance(end, int)))


def _context_length(config: Any) -> int | None:
    """The most tokens of a sequence, by the names that it has; where it is not positive, there is no limit."""
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions", "max_seq_len"))
    return next((length for length in found if isinstance(length, int) and length > 0), None)


def _asked(step_fn: StepFn, first_token: Tensor) -> tuple[Tensor, State]:
    with torch.no_grad():
        return step_fn(first_token, None, None)


def step_with_cache(module: nn.Module) -> StepFn:
    accepted = inspect.signature(module.forward).parameters
    names = [name for name in CACHE_NAMES if name in accepted]

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        seen = 0 if state is None else state.seen
        positions = input_ids.shape[-1]
        arguments: dict[str, Any] = {"use_cache": True}
        if "position_ids" in accepted:
            arguments["position_ids"] = torch.arange(seen, seen + positions, device=input_ids.device)[None]
        if keep and "logits_to_keep" in accepted:  # there 0 means all of them
            arguments["logits_to_keep"] = keep
        if state is not None:
            arguments[names[0]] = state.cache
        output = module(input_ids=input_ids, **arguments)
        cache = next((c for name in names if (c := getattr(output, name, None)) is not None), None)
        return output.logits, None if cache is None else CacheState(cache, seen + positions)

    return step_fn


def step_without_cache(module: nn.Module) -> StepFn:
    """For models that return no cache, or that hide their state in their modules: each call is a sequence of its own."""

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        if state is not None:
            raise ModelError(f"{type(module).__name__} has no cache to go on from.")
        return module(input_ids=input_ids, use_cache=False).logits, None

    return step_fn


class NoTokenizer:
    """Stands where a tokenizer could not be loaded: ids can be scored without one, and text says why it cannot."""

    name, bos = "none", None

    def __init__(self, spec: str, why: Exception) -> None:
        self.why = (
            f"{spec} has no tokenizer that can be loaded ({type(why).__name__}: {str(why).strip().splitlines()[0][:300]})."
        )

    def encode(self, text: str) -> tuple[Any, Any]:
        raise SpecError(f"{self.why} Put one into its folder, or read token ids: tokens:PATH.")


class HFTokenizer:
    """A transformers tokenizer as a `_model.Tokenizer`: no special tokens, and where in the text's bytes each token ends."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name, self.bos, self.eos = tokenizer, name, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.ends: tuple[int, ...] = () if self.eos is None else (self.eos,)

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        """The ids that it puts before a text of its own accord."""
        given, bare = (list(self.tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
        at = next((place for place in range(len(given)) if given[place : place + len(bare)] == bare), 0)
        return tuple(given[:at])

    def decode(self, ids: Any) -> str:
        """The text, without special tokens."""
        text: str = self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)
        return text

    def encode(self, text: str) -> tuple[Any, Any]:
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        # bytes[i]: how many bytes the first i characters take
        widths = np.fromiter((len(character.encode()) for character in text), dtype=np.int64, count=len(text))
        bytes_before = np.concatenate([[0], np.cumsum(widths)])
        if fast:
            ends = np.asarray([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        else:  # a slow tokenizer does not say where its tokens lie: spread the text over them evenly
            ends = np.linspace(0, len(text), len(ids) + 1)[1:].astype(np.int64)
        if len(ends):
            ends[-1] = len(text)
        return ids, bytes_before[np.maximum.accumulate(ends)]
