"""Load transformers causal LMs and their tokenizers (`hf:` of a spec)."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pytest_lmeval.errors import HubError, SpecError, described, some
from pytest_lmeval.models import (
    _gguf as gguf,
    _hf_checkpoint as checkpoint,
    _hf_placing as placing,
    _quantization as quantization,
)
from pytest_lmeval.models._adapters import put_over
from pytest_lmeval.models._hf_source import ADAPTER, Source, find, json_of, over_its_base
from pytest_lmeval.models._hub import HubCall
from pytest_lmeval.models._sources import Loaded
from pytest_lmeval.models._tensors import nbytes

THINKING = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, and most others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ("<thinking>", "</thinking>"),
)
"""Texts between which models think. Those of gpt-oss are no pair: its channels are not told apart here."""


def load(
    name: str,
    *,
    spec: str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    adapter: str = "",
    revision: str = "",
    subfolder: str = "",
    attn: str = "",
    device_map: str = "",
    tp_plan: str = "",
) -> Loaded:
    """Load a causal LM and its tokenizer from a folder, a GGUF file or the hub; weight files must hold tensors only.

    dtype   of the weights; None: as the checkpoint says
    device  where quantized weights are put, which some methods cannot move later; others are left on the CPU

    The other options are those of `_spec_options.OPTIONS`. `bytes_before` is the size of the checkpoint, if a `dtype` is given
    and the checkpoint names its own.
    """
    try:
        import transformers
    except ImportError as error:
        raise SpecError(f"{spec} needs transformers: pip install 'pytest-lmeval[hf]'") from error
    source = find(name, spec, adapter=adapter, revision=revision, subfolder=subfolder)
    source, config = _configured(source, spec, trust_remote_code)
    declared = quantization.quantization_of(config)
    placed = placing.keywords(spec, device_map, tp_plan, device if declared else None)
    attention = placing.attention(spec, attn)
    if source.folder is not None:
        checkpoint.announce_large(spec, source.folder)
    try:
        with HubCall():
            # `weights_only`: no code of a .bin runs, which is a pickle
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source.name,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                weights_only=True,
                trust_remote_code=trust_remote_code,
                **source.keywords,
                **({"config": config} if "gguf_file" in source.keywords else {}),  # which takes seconds to read
                **placed,
                **attention,
            )
    except Exception as error:  # a damaged file can make the readers raise anything
        raise _not_loaded(source, spec, error, declared) from error
    module, report = loaded
    checkpoint.refuse_incomplete(spec, report)
    placing.refuse_elsewhere(spec, module)
    facts = placing.facts_of(module, source, declared, attn)
    saved = getattr(config, "dtype", None) if dtype and not declared else None
    before = None
    if isinstance(saved, torch.dtype):  # buffers are not saved: the model computes them
        before = sum(p.numel() * saved.itemsize for p in module.parameters()) + sum(map(nbytes, module.buffers()))
    if source.adapter:
        module, facts["adapter"] = put_over(module, source.adapter, spec, dtype=dtype)
    unused = tuple(sorted(report["unexpected_keys"]))
    tokenizer = _tokenizer(source, spec, name, trust_remote_code)
    return Loaded(module.train(False), tokenizer, before, unused_weights=unused, facts=facts, placed=bool(placed))


def _configured(source: Source, spec: str, trust_remote_code: bool) -> tuple[Source, Any]:
    """The source and its configuration; of an adapter on the hub, those of its base. Raises SpecError for none."""
    import transformers
    from huggingface_hub import hf_hub_download

    keywords: dict[str, Any] = {key: value for key, value in source.keywords.items() if key != "gguf_file"}
    file = ""
    try:
        with HubCall():
            config = transformers.AutoConfig.from_pretrained(
                source.name, trust_remote_code=trust_remote_code, **source.keywords
            )
            if source.folder is not None:
                checkpoint.check_layers(config, source.folder)
            return source, config
    except Exception as error:
        not_there = not isinstance(error, HubError) or error.status == 404
        if not_there and source.folder is None and not source.adapter and "gguf_file" not in source.keywords:
            with contextlib.suppress(Exception), HubCall():  # without one, the first error says more
                file = hf_hub_download(source.name, ADAPTER, **keywords)
        if file:
            base = over_its_base(source.name, json_of(Path(file), spec), spec)
            return _configured(base, spec, trust_remote_code)
        raise _not_loaded(source, spec, error, {}) from error


def _not_loaded(source: Source, spec: str, error: Exception, declared: dict[str, Any]) -> SpecError:
    """The error for a model that could not be loaded."""
    why = described(error)
    if isinstance(error, pickle.UnpicklingError):  # whose own message tells how to run the code
        why = "its weights are a pickle that is damaged, or that could run code. Save them as safetensors"
    elif "gguf_file" in source.keywords:
        why = gguf.why_not(source.folder, source.keywords["gguf_file"], error)
    elif source.folder is not None and (broken := checkpoint.unreadable_files(source.folder)):
        why += f". Damaged: {some(broken)}; copy it again"
    elif declared:
        why = quantization.why_not(declared, error)
    return SpecError(f"{spec} could not be loaded: {why} {source.where}")


def _tokenizer(source: Source, spec: str, name: str, trust_remote_code: bool) -> HFTokenizer | NoTokenizer:
    """The tokenizer beside a model; of a subfolder without one, that of the folder above; of an adapter, its base's."""
    import transformers

    found: HFTokenizer | NoTokenizer
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **source.keywords}
    try:
        with HubCall():
            found = HFTokenizer(transformers.AutoTokenizer.from_pretrained(source.name, **options), name)
        found.decode(found.encode("a")[0])  # a damaged setting may show only now
    except Exception as error:
        if isinstance(error, HubError) and error.status != 404:
            raise SpecError(f"the tokenizer of {spec} could not be loaded: {described(error)} {source.where}") from error
        found = NoTokenizer(spec, error)
    return found


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
