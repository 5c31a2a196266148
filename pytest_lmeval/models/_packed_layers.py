"""Read the layers in which other libraries keep weights in few bits: what they hold, and the numbers that it stands for.

torchao's weights are tensors that say so themselves (`_tensors`). The layers here keep codes and scales in tensors of their
own: bitsandbytes, GPTQ and AWQ (gptqmodel), compressed-tensors before its first step, FP8 in blocks, and the blocks of GGUF.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lmeval.errors import ModelError


@dataclass(frozen=True)
class PackedWeight:
    """The weight of a layer, as it is stored.

    precision  nf4, fp4, int8, int4, fp8, q4_1, ...
    bits       of a value, without scales
    weights    how many numbers it stands for
    tensors    codes, scales and zero points, by name; parameters and buffers of the layer, and others
    computes   the type in which its layer multiplies; None: that of the input
    rounds     whether the layer rounds its input too
    """

    precision: str
    bits: float
    weights: int
    tensors: dict[str, Tensor]
    computes: torch.dtype | None = None
    rounds: bool = False

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def packed_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module, PackedWeight]]:
    """The packed layers of a module, by name, with what they hold."""
    for name, layer in module.named_modules():
        if (found := _packed(layer)) is not None:
            yield name, layer, found


def _packed(layer: Any) -> PackedWeight | None:
    """What a layer holds; None for a layer that is not packed, or not in a way that is known."""
    weight = layer._parameters.get("weight")
    kind = type(weight).__name__
    own = {**layer._parameters, **layer._buffers}
    tensors = {name: tensor for name, tensor in own.items() if tensor is not None and name != "bias"}
    if kind == "Params4bit" and (state := weight.quant_state) is not None:
        # processors that multiply bfloat16 do so, whatever was asked for: the layer repacks its weight at its first step
        rounded = weight.device.type == "cpu" and getattr(layer, "support_avx512bf16_for_cpu", False)
        computes = torch.bfloat16 if rounded else getattr(layer, "compute_dtype", None)
        return PackedWeight(str(weight.quant_type), 4.0, math.prod(state.shape), tensors | _scales(state), computes)
    if kind == "Int8Params":
        scale = _scale_of_int8(layer)
        return PackedWeight(
            "int8", 8.0, weight.numel(), tensors | ({} if scale is None else {"SCB": scale}), torch.float16, rounds=True
        )
    size = getattr(layer, "in_features", 0) * getattr(layer, "out_features", 0)
    if "qweight" in tensors and isinstance(bits := getattr(layer, "bits", None), int):
        return PackedWeight(f"int{bits}", float(bits), size, tensors)
    scheme = getattr(getattr(layer, "quantization_scheme", None), "weights", None)
    if "weight_packed" in tensors and scheme is not None:
        kind = "int" if getattr(scheme.type, "value", scheme.type) == "int" else "fp"
        return PackedWeight(f"{kind}{scheme.num_bits}", float(scheme.num_bits), size, tensors)
    if "weight_scale_inv" in tensors and weight is not None and weight.element_size() == 1:
        return PackedWeight("fp8", 8.0, weight.numel(), tensors, rounds=True)
    if isinstance(given := getattr(layer, "ggml_type", None), int) and weight is not None:
        bits = 8 * weight.numel() * weight.element_size() / max(1, size)
        return PackedWeight(_ggml_name(given), bits, size, tensors)
    return None


def unpack_layers(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace packed layers by `nn.Linear` of the numbers that they stand for. Raises ModelError for one that is unknown."""
    for name, layer, _ in list(packed_layers(module)):
        values = _values(layer).to(dtype)
        plain = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(values, requires_grad=False)
        if (bias := getattr(layer, "bias", None)) is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, plain.train(layer.training))


@torch.no_grad()
def _values(layer: Any) -> Any:
    """The numbers [out, in] that a packed layer multiplies by."""
    weight = layer._parameters.get("weight")
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes import functional

        codes, state = weight.data, copy.copy(weight.quant_state)
        if getattr(state, "packing_format_for_cpu", False):
            scales = state.absmax.T.reshape(-1).float()  # which the inverse leaves as they are, or rounds again
            codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
            state.absmax, state.nested, state.dtype = scales, False, torch.float32
        return functional.dequantize_4bit(codes, state)
    if kind == "Int8Params" and (scale := _scale_of_int8(layer)) is not None:
        return weight.data.double() * (scale.double() / 127)[:, None]
    if "weight_scale_inv" in {**layer._parameters, **layer._buffers}:
        rows, columns = weight.shape
        scales = layer.weight_scale_inv.double().reshape(-1, layer.weight_scale_inv.shape[-1] if weight.ndim > 1 else 1)
        tall, wide = -(-rows // scales.shape[0]), -(-columns // scales.shape[1])
        spread = scales.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
        return weight.double() * spread[:rows, :columns]
    if hasattr(layer, "ggml_type"):
        dequant: Any = importlib.import_module("transformers.integrations.gguf.dequant")
        return dequant.dequantize_blocks(weight, layer.ggml_type, layer.out_features, layer.in_features, torch.float32)
    if callable(dequantize := getattr(layer, "dequantize_weight", None)):  # gptqmodel: [in, out]
        return dequantize().T
    raise ModelError(f"the weights of a {type(layer).__name__} cannot be read as numbers")


def _scale_of_int8(layer: Any) -> Tensor | None:
    """The scales of a layer of bitsandbytes, which moves them at its first step."""
    scale = getattr(layer.weight, "SCB", None)
    return getattr(getattr(layer, "state", None), "SCB", None) if scale is None else scale


def _scales(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a quantization state of bitsandbytes, whose scales may be quantized too."""
    found = {f"{prefix}{name}": getattr(state, name, None) for name in ("absmax", "code", "offset")}
    nested = _scales(state.state2, f"{prefix}state2.") if getattr(state, "state2", None) is not None else {}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)} | nested


def _ggml_name(number: int) -> str:
    try:
        from gguf import GGMLQuantizationType
    except ImportError:
        return f"ggml type {number}"
    return str(GGMLQuantizationType(number).name).lower()


def holders(layer: Any) -> list[Any]:
    """The objects of a layer of bitsandbytes in which its packed weight lies, with scales and how it is packed; else none."""
    weight = layer._parameters.get("weight")
    if type(weight).__name__ not in ("Params4bit", "Int8Params"):
        return []
    state = getattr(weight, "quant_state", None)
    found = (weight, state, getattr(state, "state2", None), getattr(layer, "state", None))
    return [holder for holder in found if holder is not None]
