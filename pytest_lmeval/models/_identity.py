"""Describe a model for a record, and compute the fingerprint by which a later run recognizes it."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pytest_lmeval.errors import SpecError
from pytest_lmeval.models._model import Model, multiplied, weights
from pytest_lmeval.models._packed_layers import PackedWeight, packed_layers
from pytest_lmeval.models._source_code import code_digest
from pytest_lmeval.models._tensors import is_packed, nbytes, parts, precision_of, value_bits, whole
from pytest_lmeval.models._weak_cache import WeakCache
from pytest_lmeval.records._measured import ModelFacts, Precision

SMALL = 1 << 20  # elements up to which a tensor is hashed completely
NEARLY_ALL = 0.9  # fraction of the weights that must be in one precision for it to be that of the model
SAMPLE = 64  # elements of each tensor that are compared to detect a change, beside torch's version counter
PLAIN = (str, int, float, torch.dtype)  # bool is an int; isinstance is several times faster with a tuple than with a union
LOADED = ("name_or_path", "_name_or_path", "_commit_hash", "_is_hf_initialized")  # by transformers, from where: no settings
NO_SETTINGS = frozenset(vars(nn.Module())) - {"training"} | {*LOADED}
FUNCTIONS = (FunctionType, MethodType, partial)
TOKENIZED = "".join(map(chr, (*range(32, 127), *range(192, 256), 0x3B1, 0x416, 0x5D0, 0x4F60, 0x1F600))) + (
    " The the  the\n\t\tdef f():"
)
"""A text by which tokenizers are told apart."""
ALWAYS_HASHED = 4096  # elements up to which hashing a tensor is as fast as checking whether it has changed

DIGESTS = WeakCache[bytes]()  # by tensor
PRECISIONS = WeakCache[Precision]()  # by module
IDENTITIES = WeakCache[str]()  # random, by object that is no module and has no attribute `fingerprint`


def facts(model: Model) -> ModelFacts:
    """The facts of the model in a record: spec, size, precision, device and fingerprint."""
    digest, module, before = fingerprint(model), model.module, model.bytes_before
    if (served := model.served) is not None:
        dtype, plain = served.facts.dtype or "unknown", served.facts.plain
        return ModelFacts(spec=model.spec, form=model.form, dtype=dtype, device="server", fingerprint=digest, server=plain)
    found, packed = None, False
    if module is not None:  # cached, since `precision` reads every packed value
        cached = PRECISIONS.value(module, lambda: precision(module, bytes_before=before), stamp=(digest, before))
        found = replace(cached, kept=dict(cached.kept))
        packed = any(map(is_packed, weights(module))) or bool(held(module)) or _has_integers(module)
    return ModelFacts(
        spec=model.spec,
        form=f"{model.form}, compiled by {model.compiled}" if model.compiled else model.form,
        parameters=None if module is None else _count(module),
        bytes=sum(map(nbytes, weights(module))) + _bytes_beside(module),
        dtype=found.name if found and packed else str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        fingerprint=digest,
        precision=found,
        unused=list(model.unused_weights),
        loaded=dict(model.loaded),
    )


def precision(module: nn.Module, *, bytes_before: int | None = None) -> Precision:
    """The precision of a module, computed from the content of its tensors, not from what was requested.

    It is the precision of at least nine tenths of the weights in matrix products (`_model.multiplied`), or "mixed".
    """
    layers = held(module)
    inside = _inside(layers)
    chosen = [tensor for _, tensor in multiplied(module) if id(tensor) not in inside]
    plain: list[Tensor] = [tensor for tensor in module.parameters() if id(tensor) not in inside]
    if not chosen and not layers:
        chosen = plain
    of_all, of_chosen = Counter[str](), Counter[str]()  # number of weights in each precision
    for tensors, counts in ((plain, of_all), (chosen, of_chosen)):
        for tensor in tensors:
            counts[precision_of(tensor)] += tensor.numel()
        for _, weight in layers:
            counts[weight.precision] += weight.weights
    total, most = sum(of_chosen.values()), max(of_chosen, key=lambda name: of_chosen[name], default="mixed")
    name = "packed" if _has_integers(module) else most if of_chosen.get(most, 0) >= NEARLY_ALL * total else "mixed"
    known = [(bits, tensor.numel()) for tensor in chosen if (bits := value_bits(tensor)) is not None]
    known += [(weight.bits, weight.weights) for _, weight in layers]
    stored = sum(map(nbytes, chosen)) + sum(weight.bytes for _, weight in layers)
    readable = name != "packed" and total > 0
    return Precision(
        name=name,
        bits_per_weight=sum(bits * count for bits, count in known) / total if readable else None,
        stored_bits_per_weight=8 * stored / total if readable else None,
        bytes_before=bytes_before,
        bytes_after=sum(map(nbytes, weights(module))) + _bytes_beside(module),
        converted=of_all.get(name, 0) / max(1, sum(of_all.values())),
        converted_multiplied=of_chosen.get(name, 0) / max(1, total),
        kept={other: count for other, count in of_all.items() if other != name},
    )


def held(module: nn.Module) -> list[tuple[nn.Module, PackedWeight]]:
    """The layers in which another library keeps weights in few bits, and what they hold."""
    return [(layer, weight) for _, layer, weight in packed_layers(module)]


def _inside(layers: list[tuple[nn.Module, PackedWeight]]) -> set[int]:
    """The ids of the tensors of packed layers."""
    return {id(tensor) for layer, weight in layers for tensor in (*layer.parameters(recurse=False), *weight.tensors.values())}


def _count(module: nn.Module) -> int:
    """The number of parameters: of a packed layer, of the numbers that it stands for, and of its bias."""
    layers = held(module)
    stored = {id(tensor) for _, weight in layers for tensor in weight.tensors.values()}
    plain = sum(tensor.numel() for tensor in module.parameters() if id(tensor) not in stored)
    return plain + sum(weight.weights for _, weight in layers)


def _bytes_beside(module: nn.Module | None) -> int:
    """Bytes of what packed layers keep outside of parameters and buffers, such as the scales of bitsandbytes."""
    if module is None:
        return 0
    own = set(map(id, weights(module)))
    beside = {id(t): t for _, weight in held(module) for t in weight.tensors.values() if id(t) not in own}
    return sum(map(nbytes, beside.values()))


def _has_integers(module: nn.Module) -> bool:
    """Whether more than a tenth of its bytes are integer matrices: weights that another library packed in an unknown format."""
    tensors, known = list(weights(module)), _inside(held(module))
    integers = (
        t
        for t in tensors
        if id(t) not in known and t.ndim > 1 and min(t.shape) > 1 and t.dtype != torch.bool and value_bits(t) is None
    )
    return sum(map(nbytes, integers)) > (1 - NEARLY_ALL) * sum(map(nbytes, tensors))


def fingerprint(model: Model) -> str:
    """Sixteen hex digits that change with the model's declared facts, code, settings or weights.

    The declared facts are the form, the sizes of vocabulary and context, the codebooks, the classes, and what the model is
    compiled with, but not a limit that the probe found. The code is that of the class of every submodule, of functions and
    hooks put into one, of the function that built the model and of one that steps it, with the files of the user's project
    that it imports (see `_source_code.code_digest`). The settings are the plain attributes of every submodule, and the
    configuration of a transformers model with its attention implementation. Of a tensor with more than a million elements, an
    even sample and the sum of all are hashed.

    An object that is no torch module is identified by its attribute `fingerprint` and its code; without the attribute it is a
    new model in every run.

    A tensor is hashed again when its torch version counter, its storage or a sample of its elements has changed. This misses a
    change of a few elements of a large tensor that torch does not count (through `.data`, or by a kernel unknown to torch).
    """
    declared: list[Any] = [model.form, model.vocab_size, model.context_length]
    declared += [model.compiled] * bool(model.compiled) + [model.classes] * bool(model.classes)
    if (books := model.codebooks) is not None:
        declared += [books.sizes, books.scored, books.delays, books.gaps]
    digest = hashlib.sha256("|".join(map(str, declared)).encode())
    digest.update(code_digest(_run_by(model)))
    if model.module is None:
        own = getattr(model.source, "fingerprint", None)
        known_by = model.step_fn if model.source is None else model.source
        digest.update((f"its own: {own}" if own else IDENTITIES.value(known_by, lambda: uuid.uuid4().hex)).encode())
    else:
        settings = sorted(item for item in settings_of(model.module).items() if item[0] not in model.mutable_buffers)
        digest.update(hashlib.sha256(f"{settings}{_configurations(model.module)}".encode()).digest())
        digest.update(weights_digest(model, _cached_digest))
    return digest.hexdigest()[:16]


def _run_by(model: Model) -> Iterator[Any]:
    """The classes and functions that build and step a model, with the methods that were put into a class later."""
    yield from (model.built_by, model.step_fn)
    if model.module is None:
        yield type(model.source)
        return
    for kind in dict.fromkeys(map(type, model.module.modules())):
        yield kind
        for base in kind.__mro__[:-1]:
            if not base.__module__.startswith("torch."):
                yield from (value for value in vars(base).values() if isinstance(value, FUNCTIONS) and _put_into(base, value))
    for part in model.module.modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        yield from (value for value in (*vars(part).values(), *hooks) if isinstance(value, FUNCTIONS))


def _put_into(kind: type, function: Any) -> bool:
    """Whether a function of a class was defined elsewhere: patched, as libraries of kernels do."""
    name = getattr(function, "__qualname__", "")  # a partial has none
    return function.__module__ != kind.__module__ or not name.startswith(f"{kind.__qualname__}.")


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(_content(tensor.detach(), SMALL, total=True)).digest()


def weights_digest(model: Model, digest_of: Callable[[Tensor], bytes] = _digest) -> bytes:
    """Hash the parameters, and the buffers that hold no state; by default without the cache."""
    digest = hashlib.sha256()

    if model.module is not None:
        for name, tensor in (*model.module.named_parameters(), *model.module.named_buffers()):
            if name not in model.mutable_buffers:
                for own, part in parts(whole(tensor), name).items():
                    digest.update(f"{own}|{tuple(part.shape)}|{part.dtype}|".encode())
                    digest.update(digest_of(part))
        own_tensors = set(map(id, weights(model.module)))
        for name, _, weight in packed_layers(model.module):  # scales that are neither parameters nor buffers
            for own, part in weight.tensors.items():
                if id(part) not in own_tensors:
                    digest.update(f"{name}.{own}|{tuple(part.shape)}|{part.dtype}|".encode())
                    digest.update(digest_of(part))
    return digest.digest()


def _cached_digest(tensor: Tensor) -> bytes:
    """`_digest`, cached while the tensor is unchanged."""
    if tensor.is_inference() or tensor.numel() <= ALWAYS_HASHED:  # inference tensors have no version counter
        return _digest(tensor)
    # A weak reference differs from one to another storage at the same address.
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    view = (storage, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    stamp = (tensor._version, view, _content(tensor.detach(), SAMPLE, total=False))
    return DIGESTS.value(tensor, lambda: _digest(tensor), stamp)


def architecture_of(model: Model) -> dict[str, str]:
    """The class and the plain attributes of every submodule, by name, without what reading or training changes."""
    assert model.module is not None
    changing = {*model.mutable_buffers, *(f"{name}.training" for name, _ in model.module.named_modules())}
    kinds = {f"{name}.class": type(part).__qualname__ for name, part in model.module.named_modules()}
    return kinds | {name: value for name, value in settings_of(model.module).items() if name not in changing}


def settings_of(module: nn.Module) -> dict[str, str]:
    """The plain attributes of every submodule, by name; also lists, tuples, dicts and dataclasses of plain values."""
    return {
        f"{name}.{key}": setting
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if key not in NO_SETTINGS and (setting := _setting(value)) is not None
    }


def _setting(value: Any) -> str | None:
    """The text of a plain value, and of what holds nothing else; None for any other."""
    if isinstance(value, PLAIN):
        return repr(value)
    if not (isinstance(value, list | tuple | dict | SimpleNamespace) or is_dataclass(value)) or not value:
        return None
    try:
        return json.dumps(value, default=_fields)
    except (TypeError, ValueError):
        return None


def _fields(value: Any) -> Any:
    """The plain attributes of an object that holds settings. Raises TypeError for another object."""
    if isinstance(value, torch.dtype):
        return str(value)
    if (
        isinstance(value, type)
        or hasattr(value, "to_json_string")
        or not (isinstance(value, SimpleNamespace) or is_dataclass(value))
    ):
        raise TypeError
    return {name: setting for name, own in vars(value).items() if (setting := _setting(own)) is not None}


def _configurations(module: nn.Module) -> list[str]:
    """The configurations of a transformers model, with what their JSON leaves out, such as the attention implementation."""
    configs = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    found = []
    for config in configs.values():
        if callable(to_json := getattr(config, "to_json_string", None)):
            private = {key: value for key, value in vars(config).items() if key[:1] == "_" and key not in LOADED}
            found.append(f"{to_json()}{private}")
    return found


def _content(tensor: Tensor, limit: int, *, total: bool) -> bytes:
    """The bytes of a tensor; of one with more than `limit` elements, an even sample, after the sum of all if `total`."""
    flat, head = tensor.reshape(-1), b""
    if flat.numel() > limit:
        if total:
            head = str((flat.sum(dtype=torch.float64) if flat.is_floating_point() else flat.sum()).item()).encode()
        flat = flat[:: flat.numel() // limit]
    return head + flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def tokenizer_fingerprint(lm: Model) -> str:
    """A hash of how the tokenizer encodes a text with many kinds of characters, and of its special tokens."""
    if lm.tokenizer is None:
        return ""
    try:
        encoded = [list(map(int, part)) for part in lm.tokenizer.encode(TOKENIZED)]
    except SpecError:
        return "none"
    special = [getattr(lm.tokenizer, name, None) for name in ("bos", "eos", "prefix")]
    special += ["special tokens"] * bool(getattr(lm.tokenizer, "special_tokens", False))
    return hashlib.sha256(f"{encoded} {special}".encode()).hexdigest()[:16]
