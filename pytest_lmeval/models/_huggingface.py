"""Load and step transformers causal LMs, with every kind of cache.

The model makes its own cache in the first step: one made without the configuration would not know which layers have windows.
Positions are always passed, since some models restart them with each chunk.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pytest_lmeval.errors import HubError, ModelError, SpecError, described, some
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._cache_state import PACKED_ARGUMENTS, CacheState, packing_of
from pytest_lmeval.models._free_memory import free_bytes
from pytest_lmeval.models._hub import HubCall
from pytest_lmeval.models._model import Model, State, StepFn, devices_note, tokenizer_for
from pytest_lmeval.models._sources import Loaded
from pytest_lmeval.models._tensors import nbytes
from pytest_lmeval.records._journal import warn

CACHE_NAMES = ("past_key_values", "cache_params", "state")  # the last two: Mamba and its relatives, RWKV
THINKING = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, and most others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ("<thinking>", "</thinking>"),
)
"""Texts between which models think. Those of gpt-oss are no pair: its channels are not told apart here."""
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


def load(name: str, *, spec: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Loaded:
    """Load a causal LM and its tokenizer from a folder or the hub; weight files must hold tensors only.

    `bytes_before` is the size of the checkpoint, if a `dtype` is given and the checkpoint names its own.
    """
    specs.check_path(spec, name)
    try:
        import transformers
    except ImportError as error:
        raise SpecError(f"{spec} needs transformers: pip install 'pytest-lmeval[hf]'") from error
    folder = Path(name).expanduser()
    source, where = name, f"is no folder here, so it was looked up on the hub.){specs.nearest_folder(name)}"
    if folder.is_dir():
        source, where = str(folder), "is a folder here.)"
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    _announce_large(spec, folder)
    try:
        with HubCall():
            config = transformers.AutoConfig.from_pretrained(source, **options)
            _check_layers(config, folder)
            # `weights_only`: no code of a .bin runs, which is a pickle
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                weights_only=True,
                **options,
            )
    except Exception as error:  # a damaged file can make the readers raise anything
        why = described(error)
        if isinstance(error, pickle.UnpicklingError):  # whose own message tells how to run the code
            why = "its weights are a pickle that is damaged, or that could run code. Save them as safetensors"
        elif broken := _unreadable_files(folder):
            why += f". Damaged: {some(broken)}; copy it again"
        raise SpecError(f"{spec} could not be loaded: {why} ({name!r} {where}") from error
    module, report = loaded
    _refuse_incomplete(spec, report)
    tokenizer: HFTokenizer | NoTokenizer
    try:
        with HubCall():
            tokenizer = HFTokenizer(transformers.AutoTokenizer.from_pretrained(source, **options), name)
        tokenizer.decode(tokenizer.encode("a")[0])  # a damaged setting may show only now
    except Exception as error:
        if isinstance(error, HubError) and error.status != 404:
            raise SpecError(f"the tokenizer of {spec} could not be loaded: {described(error)} ({name!r} {where}") from error
        tokenizer = NoTokenizer(spec, error)
    saved = getattr(config, "dtype", None) if dtype and not getattr(config, "quantization_config", None) else None
    before = None
    if isinstance(saved, torch.dtype):  # buffers are not saved: the model computes them
        before = sum(p.numel() * saved.itemsize for p in module.parameters()) + sum(map(nbytes, module.buffers()))
    return Loaded(module.train(False), tokenizer, before, unused_weights=tuple(sorted(report["unexpected_keys"])))


def _check_layers(config: Any, folder: Path) -> None:
    """Raise ValueError for more layers than the checkpoint in a folder has tensors: building 2 ** 70 of them never ends."""
    from safetensors import safe_open

    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or not (files := list(folder.glob("*.safetensors"))):
        return
    tensors = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors += len(opened.keys())
    if layers > tensors:
        raise ValueError(f"config.json says {layers:,} layers, and the checkpoint has {tensors:,} tensors")


def _announce_large(spec: str, folder: Path) -> None:
    """Warn if the weights in a folder are larger than the free memory: the system may kill the process that loads them."""
    size, free = sum(file.stat().st_size for file in folder.glob("*.safetensors")), free_bytes(torch.device("cpu"))
    if free is not None and size > free:
        warn(f"{spec}: its weights take {size:,} bytes on the disk, and {free:,} are free in memory; loading them may fail.")


def _unreadable_files(folder: Path) -> list[str]:
    """The names of the files of a checkpoint that cannot be parsed."""
    from safetensors import safe_open

    found = []
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            else:
                with safe_open(file, "pt"):
                    pass
        except Exception:  # noqa: BLE001 - whatever it is, the file is named
            found.append(file.name)
    return found


def _refuse_incomplete(spec: str, report: dict[str, Any]) -> None:
    """Raise SpecError if the checkpoint lacks weights, or holds some of another shape, as transformers' report on loading says.

    Weights tied to others, and tensors that the model computes, are not in the report.
    """
    missing = sorted(report["missing_keys"])
    wrong = [f"{name} {list(saved)} for {list(own)}" for name, saved, own in sorted(report["mismatched_keys"])]
    if not missing and not wrong:
        return
    listed = "; ".join(f"{what}: {some(names)}" for what, names in (("missing", missing), ("of another shape", wrong)) if names)
    raise SpecError(
        f"{spec} is incomplete. Of the weights of its model, {listed}. transformers fills these with initial values, "
        "most of them random, so each load would give another model. Save the checkpoint again, or mend its config.json."
    )


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


def step_with_cache(module: nn.Module) -> StepFn:
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
        if state is not None:
            arguments[names[0]] = state.cache
        output = module(input_ids=input_ids, **arguments)
        cache = next((c for name in names if (c := getattr(output, name, None)) is not None), None)
        return output.logits, None if cache is None else CacheState(cache, seen + positions)

    if accepted.keys() >= PACKED_ARGUMENTS:
        step_fn.packing = packing_of(module)  # type: ignore[attr-defined]
    return step_fn


def step_without_cache(module: nn.Module) -> StepFn:
    """For models that return no cache or keep their state inside: each call reads a new sequence."""

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        if state is not None:
            raise ModelError(f"{type(module).__name__} has no cache to continue.")
        return module(input_ids=input_ids, use_cache=False).logits, None

    return step_fn


class NoTokenizer:
    """Used if a tokenizer fails to load: token ids can still be scored, and `encode` raises SpecError with the reason."""

    name, bos = "none", None

    def __init__(self, spec: str, error: Exception) -> None:
        self.why = f"{spec} has no tokenizer that can be loaded ({described(error)})."

    def encode(self, text: str) -> tuple[Any, Any]:
        raise SpecError(f"{self.why} Put one into its folder, or read token ids: tokens:PATH.")


class HFTokenizer:
    """A transformers tokenizer as a `_model.Tokenizer`: adds no special tokens, and gives the byte where each token ends."""

    def __init__(self, tokenizer: Any, name: str, *, special_tokens: bool = False) -> None:
        self.special_tokens = special_tokens
        self.tokenizer, self.name, self.bos, self.eos = tokenizer, name, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.ends: tuple[int, ...] = () if self.eos is None else (self.eos,)
        self.chat_template_kwargs: dict[str, Any] = {}  # see `_chat.with_template_kwargs`

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts before a text by default."""
        with_special, bare = (list(self.tokenizer("a", add_special_tokens=on)["input_ids"]) for on in (True, False))
        starts = (i for i in range(len(with_special)) if with_special[i : i + len(bare)] == bare)
        return tuple(with_special[: next(starts, 0)])

    @functools.cached_property
    def special(self) -> dict[int, str]:
        """The texts of the special tokens, by id: `decode` leaves these out."""
        added = {token for token, one in self.tokenizer.added_tokens_decoder.items() if one.special}
        ids = sorted(added | set(self.tokenizer.all_special_ids))
        return dict(zip(ids, map(str, self.tokenizer.convert_ids_to_tokens(ids)), strict=True))

    @functools.cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts of the tokens by which a chat template divides turns: the special ones, and others that it writes."""
        added = self.tokenizer.added_tokens_decoder.values()
        written = (one.content for one in added if one.content.strip() and one.content in self.template)
        return tuple(dict.fromkeys((*self.special.values(), *written)))

    @property
    def apply_chat_template(self) -> Callable[..., Any] | None:
        """That of transformers; None without a template."""
        given = getattr(self.tokenizer, "chat_template", None)
        return self.tokenizer.apply_chat_template if given else None

    @property
    def templates(self) -> tuple[str, ...]:
        """The names of the templates, if there are several."""
        given = getattr(self.tokenizer, "chat_template", None)
        return tuple(given) if isinstance(given, dict) else ()

    @property
    def template(self) -> str:
        """The text of the template that is rendered; empty without one."""
        given = getattr(self.tokenizer, "chat_template", None) or ""
        asked = self.chat_template_kwargs.get("chat_template")
        return str(given.get(asked or "default", asked or "") if isinstance(given, dict) else asked or given)

    @property
    def thinking(self) -> tuple[str, str] | None:
        """The texts between which the model thinks: a known pair that are added tokens, or stand in the chat template."""
        added = {str(one) for one in self.tokenizer.added_tokens_decoder.values()}
        known = (pair for pair in THINKING if all(one in added or one in self.template for one in pair))
        return next(known, None)

    def with_special_tokens(self) -> HFTokenizer:
        reading = copy.copy(self)
        reading.special_tokens = True
        return reading

    def decode(self, ids: Any) -> str:
        """Return the text, without special tokens."""
        return str(self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))

    def encode_plain(self, text: str) -> np.ndarray:
        """The ids of a text in which no token that was added to the vocabulary is found, special or not."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return np.asarray(self.encode(text)[0])
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        return np.asarray([token.id for word in words for token in backend.model.tokenize(word)], dtype=np.int64)

    def encode(self, text: str) -> tuple[Any, Any]:
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=not self.special_tokens,
            return_offsets_mapping=fast,
            verbose=False,
        )
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        widths = np.fromiter((len(character.encode()) for character in text), dtype=np.int64, count=len(text))
        bytes_before = np.concatenate([[0], np.cumsum(widths)])  # [i]: bytes of the first i characters
        if fast:
            ends = np.asarray([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        else:  # slow tokenizers have no offsets: spread the text evenly over the tokens
            ends = np.linspace(0, len(text), len(ids) + 1)[1:].astype(np.int64)
        if len(ends):
            ends[-1] = len(text)
        return ids, bytes_before[np.maximum.accumulate(ends)]
