"""Which model is this? What a record says of it, and a fingerprint by which a later run knows it again."""

from __future__ import annotations

import functools
import hashlib
import inspect
import uuid
from pathlib import Path

import torch
from torch import Tensor, nn

from pytest_lmeval.errors import SpecError
from pytest_lmeval.models.model import Model, multiplied, weights
from pytest_lmeval.models.tensors import is_packed, nbytes, parts, precision_of, value_bits
from pytest_lmeval.records.measured import ModelFacts, Precision

SMALL = 1 << 20  # elements of a tensor up to which all of them are hashed
NEARLY_ALL = 0.9  # share of the weights in one precision from which on it is the model's
SAMPLE = 64  # elements of each tensor by which a change is noticed, beside torch's own count of changes


def facts(model: Model) -> ModelFacts:
    """What a record says about the model: spec, size, precision, place and fingerprint."""
    known, found = fingerprint(model), None
    if model.module is not None:  # every packed value is looked at, so not again while the model is the same
        if model.remembered.get("precision_of") != known:
            model.remembered.update(precision_of=known, precision=precision(model.module, bytes_before=model.bytes_before))
        found = model.remembered["precision"]
    packed = model.module is not None and (any(map(is_packed, weights(model.module))) or _has_integers(model.module))
    return ModelFacts(
        spec=model.spec,
        form=model.form,
        parameters=sum(p.numel() for p in model.module.parameters()) if model.module is not None else None,
        bytes=sum(map(nbytes, weights(model.module))),
        dtype=found.name if found and packed else str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        fingerprint=known,
        precision=found,
    )


def precision(module: nn.Module, *, bytes_before: int | None = None) -> Precision:
    """What the weights of a module are, found by looking at what its tensors hold, never by what was asked for.

    The weights that are multiplied are those of `model.multiplied`; a precision is that of the model if nine tenths of them are
    in it.
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
    """Sixteen hex digits that change when the model does: its form, its code, its settings, its weights.

    The code is that of every class of module in it (but torch's own), the settings are the plain attributes of every module.
    Tensors of more than a million elements enter by an even sample of about that many and the sum of all, so that a model
    of many gigabytes is told apart in seconds. An object that is no module is known by its attribute `fingerprint`; without
    one, it is taken for a new model in every run.
    """
    if model.module is None:
        own = getattr(model.source, "fingerprint", None)
        if "fingerprint" not in model.remembered:
            model.remembered["fingerprint"] = hashlib.sha256(f"{own or uuid.uuid4()}".encode()).hexdigest()[:16]
        return str(model.remembered["fingerprint"])
    versions = [
        (id(tensor), 0 if tensor.is_inference() else tensor._version, _content(tensor.detach(), SAMPLE, total=False))
        for whole in weights(model.module)
        for tensor in parts(whole).values()
    ]
    unchanged = hash((tuple(versions), _settings(model)))
    if model.remembered.get("unchanged") != unchanged:
        code = {f"{type(part).__module__}.{type(part).__qualname__}": _file(type(part)) for part in model.module.modules()}
        about = [model.form, model.vocab_size, model.context_length]
        if (codes := model.codebooks) is not None:
            about += [codes.sizes, codes.scored, codes.delays]
        digest = hashlib.sha256(f"{'|'.join(map(str, about))}|{_settings(model)}".encode())
        for name, file in sorted(code.items()):
            digest.update(_code(name, file))
        digest.update(weights_digest(model))
        model.remembered.update(unchanged=unchanged, fingerprint=digest.hexdigest()[:16])
    return str(model.remembered["fingerprint"])


def weights_digest(model: Model) -> bytes:
    """A hash of the parameters, and of the buffers that hold no state."""
    digest = hashlib.sha256()
    if model.module is not None:
        for name, tensor in (*model.module.named_parameters(), *model.module.named_buffers()):
            if name not in model.volatile:
                for own, part in parts(tensor, name).items():
                    digest.update(f"{own}|{tuple(part.shape)}|{part.dtype}".encode())
                    digest.update(_content(part.detach(), SMALL, total=True))
    return digest.digest()


def architecture_of(model: Model) -> dict[str, str]:
    """The class of every module in it and their plain attributes, by name, but those that reading or training changes."""
    assert model.module is not None
    changing = {*model.volatile, *(f"{name}.training" for name, _ in model.module.named_modules())}
    kinds = {f"{name}.class": type(part).__qualname__ for name, part in model.module.named_modules()}
    return kinds | {name: value for name, value in settings_of(model.module).items() if name not in changing}


def settings_of(module: nn.Module) -> dict[str, str]:
    """The plain attributes of every part, by name."""
    return {
        f"{name}.{key}": repr(value)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, str | int | float | bool) and not key.startswith("_")
    }


def _settings(model: Model) -> str:
    assert model.module is not None
    plain = sorted(item for item in settings_of(model.module).items() if item[0] not in model.volatile)
    to_json = getattr(getattr(model.module, "config", None), "to_json_string", None)
    return f"{plain}{to_json() if callable(to_json) else ''}"


def _file(kind: type) -> str:
    try:
        return "" if kind.__module__.startswith("torch.") else inspect.getsourcefile(kind) or ""
    except (OSError, TypeError):  # written at a prompt, or compiled
        return ""


@functools.cache
def _code(name: str, file: str) -> bytes:
    return name.encode() + (Path(file).read_bytes() if file and Path(file).is_file() else b"")


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
