"""Declare the options of a model spec, `hf:FOLDER,NAME=VALUE`, each in one row. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CACHES = ("static", "quantized")
CACHE_BACKENDS = ("fp8", "quanto", "hqq")
STATIC_LENGTH = 4096  # tokens of a static cache, if neither the spec nor the model sets fewer


@dataclass(frozen=True)
class Option:
    """An option of a spec.

    read     reads its value; raises ValueError with what to write
    sources  the model sources that take it, as a keyword of its name; empty: it is of every model
    takes    what its value is
    does     what it does
    path     whether its value may be a path, which may hold commas
    """

    read: Callable[[str], Any]
    sources: tuple[str, ...] = ()
    takes: str = ""
    does: str = ""
    path: bool = False


@dataclass(frozen=True)
class CacheChoice:
    """The KV cache that an option `cache` asks for.

    kind     one of CACHES
    length   most tokens of a static one; None: as many as the model reads, up to STATIC_LENGTH
    backend  of CACHE_BACKENDS, which packs a quantized one
    """

    kind: str
    length: int | None = None
    backend: str = ""


def _backend(value: str) -> str:
    """The backend of torch.compile that the option `compile` names; "" for none."""
    if value in ("True", "False"):
        return "inductor" if value == "True" else ""
    if not value.isidentifier() or value.lower() in ("true", "false", "yes", "no", "on", "off"):
        raise ValueError("write compile=True, or compile=BACKEND with a backend of torch.compile, such as inductor")
    return value


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("give it a value")
    return value


def _cache(value: str) -> CacheChoice | None:
    """The cache that a value asks for; None for that of the model itself."""
    kind, colon, more = value.partition(":")
    if value == "dynamic":
        return None
    if kind == "static" and (not colon or (more.isascii() and more.isdigit() and int(more))):
        return CacheChoice("static", int(more) if more else None)
    if kind == "quantized" and (not colon or more in CACHE_BACKENDS):
        return CacheChoice("quantized", backend=more or CACHE_BACKENDS[0])
    raise ValueError(
        "write cache=static, cache=static:TOKENS, cache=quantized, or "
        f"cache=quantized:BACKEND with {', '.join(CACHE_BACKENDS[:-1])} or {CACHE_BACKENDS[-1]}"
    )


def _device_map(value: str) -> str:
    known = ("auto", "balanced", "balanced_low_0", "sequential")
    if value not in known:
        raise ValueError(f"write one of {', '.join(known)}; a single device is chosen with --lmeval-device")
    return value


def _tp_plan(value: str) -> str:
    if value != "auto":
        raise ValueError("write tp_plan=auto, the plan that the model's class declares")
    return value


HF = ("hf",)

OPTIONS = {
    "compile": Option(_backend, (), "`True`, or a backend of `torch.compile`", "compiles the model"),
    "adapter": Option(_text, HF, "folder or hub id", "puts a PEFT adapter over the model", path=True),
    "revision": Option(_text, HF, "branch, tag or commit", "the version of a model of the hub"),
    "subfolder": Option(_text, HF, "path inside of the model", "where the model's files are"),
    "attn": Option(_text, HF, "`eager`, `sdpa`, `flash_attention_2`, ...", "the attention implementation"),
    "device_map": Option(
        _device_map, HF, "`auto`, `balanced`, `balanced_low_0`, `sequential`", "spreads the layers over devices"
    ),
    "tp_plan": Option(_tp_plan, HF, "`auto`", "splits each layer over the ranks of torchrun"),
    "cache": Option(_cache, HF, "`static[:TOKENS]`, `quantized[:BACKEND]`", "the KV cache that is carried"),
}
"""The options of specs, by name."""
