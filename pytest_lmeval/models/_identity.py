"""Describe a model for a record, and give it a fingerprint by which a later run knows it again."""

from __future__ import annotations

import hashlib
import inspect
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pytest_lmeval.errors import SpecError
from pytest_lmeval.models._model import Model, multiplied, weights
from pytest_lmeval.models._tensors import is_packed, nbytes, parts, precision_of, value_bits
from pytest_lmeval.models._weak_cache import WeakCache
from pytest_lmeval.records._measured import ModelFacts, Precision

SMALL = 1 << 20  # elements of a tensor up to which all of them are hashed
NEARLY_ALL = 0.9  # share of the weights in one precision from which on it is the model's
SAMPLE = 64  # elements of each tensor by which a change is noticed, beside torch's own count of changes
PLAIN = (str, int, float)  # bool is an int; a tuple, since isinstance takes several times as long with a union
LOADED_FROM = "name_or_path"  # the attribute in which transformers keeps a folder; a copy of it holds the same model
AS_CHEAP = 4096  # elements of a tensor up to which hashing it takes no longer than looking whether it has changed

DIGESTS = WeakCache[bytes]()  # of tensors
PRECISIONS = WeakCache[Precision]()  # of modules
IDENTITIES = WeakCache[str]()  # of objects that are no modules and have no fingerprint of their own


def facts(model: Model) -> ModelFacts:
    """What a record says about the model: spec, size, precision, place and fingerprint."""
    known, module, before = fingerprint(model), model.module, model.bytes_before
    found, packed = None, False
    if module is not None:  # `precision` reads every packed value, so it is kept while the model is the same
        kept = PRECISIONS.value(module, lambda: precision(module, bytes_before=before), stamp=(known, before))
        found = replace(kept, kept=dict(kept.kept))
        packed = any(map(is_packed, weights(module))) or _has_integers(module)
    return ModelFacts(
        spec=model.spec,
        form=model.form,
        parameters=None if module is None else sum(p.numel() for p in module.parameters()),
        bytes=sum(map(nbytes, weights(module))),
        dtype=found.name if found and packed else str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        fingerprint=known,
        precision=found,
    )


def precision(module: nn.Module, *, bytes_before: int | None = None) -> Precision:
    """What the weights of a module are, found by looking at what its tensors hold, never by what was asked for.

    The weights that are multiplied are those of `_model.multiplied`; a precision is that of the model if nine tenths of them
    are in it.
    """
    chosen = [tensor for _, tensor in multiplied(module)] or list(module.parameters())
    of_all, of_chosen = _counts(list(module.parameters())), _counts(chosen)
    total, most = sum(of_chosen.values()), max(of_chosen, key=lambda name: of_chosen[name], default="mixed")
    name = "packed" if _has_integers(module) else most if of_chosen.get(most, 0) >= NEARLY_ALL * total else "mixed"
    known = [(bits, tensor.numel()) for tensor in chosen if (bits := value_bits(tensor)) is not None]
    readable = name != "packed" and total > 0
    return Precision(
        name=name,
        bits_per_weight=sum(bits * count for bits, count in known) / total if readable else None,
        stored_bits_per_weight=8 * sum(map(nbytes, chosen)) / total if readable else None,
        bytes_before=bytes_before,
        bytes_after=sum(map(nbytes, weights(module))),
        converted=of_all.get(name, 0) / max(1, sum(of_all.values())),
        converted_multiplied=of_chosen.get(name, 0) / max(1, total),
        kept={other: count for other, count in of_all.items() if other != name},
    )


def _counts(tensors: list[Tensor]) -> dict[str, int]:
    """Parameters of each precision."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[precision_of(tensor)] = counts.get(precision_of(tensor), 0) + tensor.numel()
    return counts


def _has_integers(module: nn.Module) -> bool:
    """Whether a tenth of its bytes are matrices of plain integers: weights that another library packed in its own way."""
    tensors = list(weights(module))
    integers = (t for t in tensors if t.ndim > 1 and min(t.shape) > 1 and t.dtype != torch.bool and value_bits(t) is None)
    return sum(map(nbytes, integers)) > (1 - NEARLY_ALL) * sum(map(nbytes, tensors))


def fingerprint(model: Model) -> str:
    """Sixteen hex digits that change when the model does: its declared facts, its code, its settings, its weights.

    The declared facts are the form, the sizes of vocabulary and context, and the codebooks, but not a limit that the probe
    found. The code is that of the class of every module in it (but torch's own), as it is in its file now. The settings are the
    plain attributes of every module. Tensors of more than a million elements enter by an even sample of about that many and the
    sum of all, so that a model of many gigabytes is known in seconds.

    An object that is no torch module enters by its attribute `fingerprint`; without one, every object is a new model in every
    run.

    Only the present content decides, not who asked before. A tensor is hashed again when torch's count of its changes, its
    storage or a sample of its elements differs; that misses a change of a few elements of a large tensor which torch does not
    count (through `.data`, or by a kernel that torch does not know).
    """
    declared: list[Any] = [model.form, model.vocab_size, model.context_length]
    if (books := model.codebooks) is not None:
        declared += [books.sizes, books.scored, books.delays, books.gaps]
    digest = hashlib.sha256("|".join(map(str, declared)).encode())
    if model.module is None:
        digest.update(_identity_of(model).encode())
    else:
        digest.update(hashlib.sha256(_settings(model).encode()).digest())
        digest.update(_code_digest(model.module))
        digest.update(_weights_digest(model, _kept_digest))
    return digest.hexdigest()[:16]


def _identity_of(model: Model) -> str:
    """The fingerprint that the object behind the model gives itself, or a random one that this object keeps."""
    if own := getattr(model.source, "fingerprint", None):
        return f"its own: {own}"
    return IDENTITIES.value(model.step_fn if model.source is None else model.source, lambda: uuid.uuid4().hex)


def weights_digest(model: Model) -> bytes:
    """Hash the parameters, and the buffers that hold no state, every tensor anew."""
    return _weights_digest(model, _digest)


def _weights_digest(model: Model, digest_of: Callable[[Tensor], bytes]) -> bytes:
    digest = hashlib.sha256()
    if model.module is not None:
        for name, tensor in (*model.module.named_parameters(), *model.module.named_buffers()):
            if name not in model.mutable_buffers:
                for own, part in parts(tensor, name).items():
                    digest.update(f"{own}|{tuple(part.shape)}|{part.dtype}|".encode())
                    digest.update(digest_of(part))
    return digest.digest()


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(_content(tensor.detach(), SMALL, total=True)).digest()


def _kept_digest(tensor: Tensor) -> bytes:
    """Return what `_digest` does, without hashing a tensor again that has not changed.

    Torch does not count the changes of inference tensors, so they are always hashed. A weak reference tells a new storage from
    an old one at the same address.
    """
    if tensor.is_inference() or tensor.numel() <= AS_CHEAP:
        return _digest(tensor)
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    view = (storage, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    stamp = (tensor._version, view, _content(tensor.detach(), SAMPLE, total=False))
    return DIGESTS.value(tensor, lambda: _digest(tensor), stamp)


def architecture_of(model: Model) -> dict[str, str]:
    """The class of every module in it and their plain attributes, by name, but those that reading or training changes."""
    assert model.module is not None
    changing = {*model.mutable_buffers, *(f"{name}.training" for name, _ in model.module.named_modules())}
    kinds = {f"{name}.class": type(part).__qualname__ for name, part in model.module.named_modules()}
    return kinds | {name: value for name, value in settings_of(model.module).items() if name not in changing}


def settings_of(module: nn.Module) -> dict[str, str]:
    """The plain attributes of every part, by name, but where transformers loaded it from."""
    return {
        f"{name}.{key}": repr(value)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if key[:1] != "_" and isinstance(value, PLAIN) and key != LOADED_FROM
    }


def _settings(model: Model) -> str:
    assert model.module is not None
    plain = sorted(item for item in settings_of(model.module).items() if item[0] not in model.mutable_buffers)
    to_json = getattr(getattr(model.module, "config", None), "to_json_string", None)
    return f"{plain}{to_json() if callable(to_json) else ''}"


def _code_digest(module: nn.Module) -> bytes:
    """Hash the names and the source files of the classes of all modules in it; of torch's own, the names."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in {type(part) for part in module.modules()}}
    files = {name: _file(kind) for name, kind in kinds.items()}
    contents = {file: hashlib.sha256(_read(file)).digest() for file in set(files.values())}
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(f"{name}|".encode() + contents[file])
    return digest.digest()


def _file(kind: type) -> str:
    try:
        return "" if kind.__module__.startswith("torch.") else inspect.getsourcefile(kind) or ""
    except (OSError, TypeError):  # written at a prompt, or compiled
        return ""


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes() if file else b""
    except OSError:  # it lies in an archive, or was removed
        return b""


def _content(tensor: Tensor, limit: int, *, total: bool) -> bytes:
    """The bytes of a tensor; of one with more elements than `limit`, those of an even sample, and the sum of all if `total`."""
    flat, head = tensor.reshape(-1), b""
    if flat.numel() > limit:
        if total:
            head = str((flat.sum(dtype=torch.float64) if flat.is_floating_point() else flat.sum()).item()).encode()
        flat = flat[:: flat.numel() // limit]
    return head + flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def tokenizer_fingerprint(lm: Model) -> str:
    """Changes when the tokenizer does: a hash of what it makes of a text of many kinds of characters."""
    if lm.tokenizer is None:
        return ""
    sample = (
        "".join(map(chr, (*range(32, 127), *range(192, 256), 0x3B1, 0x416, 0x5D0, 0x4F60, 0x1F600)))
        + " The the  the\n\t\tdef f():"
    )
    try:
        encoded = [list(map(int, part)) for part in lm.tokenizer.encode(sample)]
    except SpecError:
        return "none"
    special = [getattr(lm.tokenizer, name, None) for name in ("bos", "eos", "prefix")]
    return hashlib.sha256(f"{encoded} {special}".encode()).hexdigest()[:16]
