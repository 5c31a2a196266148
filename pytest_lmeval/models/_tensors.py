"""Find the precision and the size of a tensor from its content: a packed weight claims float32 and stores integers.

Quantized weights are tensor subclasses; their inner tensors are found by torch's protocol for these, `__tensor_flatten__`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lmeval.models._packed_layers import unpack_layers

FLOATS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def is_packed(tensor: Tensor) -> bool:
    """Whether it is made of inner tensors."""
    return hasattr(tensor, "__tensor_flatten__") and not is_split(tensor)


def is_split(tensor: Tensor) -> bool:
    """Whether each rank of a distributed run holds a part of it (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor; one that is split is gathered, in which all ranks must take part."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def parts(tensor: Tensor, name: str = "") -> dict[str, Tensor]:
    """The plain tensors that it is made of, by name; for a plain one, itself; of one that is split, the part of this rank."""
    if is_split(tensor):
        return {name: tensor.to_local()}  # type: ignore[attr-defined]
    if not is_packed(tensor):
        return {name: tensor}
    inner: list[str] = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return {key: part for own in inner for key, part in parts(getattr(tensor, own), f"{name}.{own}".lstrip(".")).items()}


def nbytes(tensor: Tensor) -> int:
    """Bytes in memory, scales and zero points included; of one that is split, on all ranks."""
    if is_split(tensor):
        return tensor.numel() * tensor.element_size()
    return sum(part.numel() * part.element_size() for part in parts(tensor).values())


def value_bits(tensor: Tensor) -> float | None:
    """Bits per value, without scales; of a packed tensor those that its integers take, or fewer if it declares a narrower type
    and all of them fit. None for plain integers, whose meaning is unknown."""
    values = _values(tensor)
    if not is_packed(tensor):
        return 8.0 * values.element_size() if values.is_floating_point() else None
    stored = 8 * values.numel() * values.element_size() / max(1, tensor.numel())
    declared = re.fullmatch(r"torch\.int(\d+)", str(_context(tensor).get("target_dtype")))  # by torchao, two to eight bits
    named = int(declared[1]) if declared else 64
    if named >= stored or values.is_floating_point() or values.numel() != tensor.numel():
        return stored
    low, high = (int(bound) for bound in torch.aminmax(values))
    return float(named) if -(1 << named - 1) <= low and high < 1 << named - 1 else stored


def precision_of(tensor: Tensor) -> str:
    """The precision of its values: fp32, bf16, fp16, int8, int4; `packed` if it is unknown."""
    bits, values = value_bits(tensor), _values(tensor)
    if bits is None:
        return "packed"
    return FLOATS.get(values.dtype, f"fp{bits:g}") if values.is_floating_point() else f"int{bits:g}"


def rounds_activations(tensor: Tensor) -> bool:
    """Whether activations that are multiplied by it are rounded too (usually to eight bits), as its context says."""
    return any(value is not None for key, value in _context(tensor).items() if key.startswith(("act", "input_quant")))


def unpack(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace packed weights by their dequantized values in `dtype`. Raises ModelError for layers that cannot be read."""
    unpack_layers(module, dtype)
    unpacked: dict[int, nn.Parameter] = {}  # weights may be shared
    for part in module.modules():
        for name, packed in part._parameters.items():
            if packed is not None and is_packed(packed):
                if id(packed) not in unpacked:
                    unpacked[id(packed)] = nn.Parameter(packed.detach().dequantize().to(dtype), requires_grad=False)
                part._parameters[name] = unpacked[id(packed)]


def _values(tensor: Tensor) -> Tensor:
    """The largest part: there are fewer scales and zero points than values."""
    return max(parts(tensor).values(), key=lambda part: part.numel() * part.element_size())


def _context(tensor: Tensor) -> dict[str, Any]:
    """The declarations of a packed tensor."""
    context: Any = tensor.__tensor_flatten__()[1] if is_packed(tensor) else None  # type: ignore[attr-defined]
    return context if isinstance(context, dict) else {}
