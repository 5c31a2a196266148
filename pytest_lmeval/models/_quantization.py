"""Describe the quantization that a transformers checkpoint declares, and explain why one cannot be loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from pytest_lmeval.errors import described

NEEDS = {  # method -> modules that it needs, and what installs them
    "bitsandbytes": (("bitsandbytes", "accelerate"), "pytest-lmeval[quantized]"),
    "compressed-tensors": (("compressed_tensors", "accelerate"), "pytest-lmeval[quantized]"),
    "torchao": (("torchao",), "pytest-lmeval[precision]"),
    "gptq": (("gptqmodel", "optimum"), "gptqmodel optimum"),
    "awq": (("gptqmodel", "accelerate"), "gptqmodel accelerate"),
    "fp8": (("accelerate",), "accelerate"),
    "fbgemm_fp8": (("accelerate", "kernels"), "accelerate kernels"),
    "mxfp4": (("accelerate", "kernels"), "accelerate kernels"),
    "hqq": (("hqq",), "hqq"),
    "quanto": (("optimum",), "optimum-quanto"),
}


def quantization_of(config: Any) -> dict[str, Any]:
    """The quantization that the configuration of a model declares; empty for none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        text = config.get_text_config() if hasattr(config, "get_text_config") else None
        found = getattr(text, "quantization_config", None)
    if found is None or isinstance(found, dict):
        return dict(found or {})
    return dict(found.to_dict())


def method_of(declared: dict[str, Any]) -> str:
    """The name of the method; empty for none."""
    if not declared:
        return ""
    method = declared.get("quant_method") or (
        "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & declared.keys() else "unknown"
    )
    return str(getattr(method, "value", method))


def shown(declared: dict[str, Any]) -> str:
    """The method and its settings of bits, types and groups, for the record."""
    groups = declared.get("config_groups") or {}
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    of_group = (first.get("weights") or {}) if isinstance(first, dict) else {}
    given = {
        "bits": declared.get("bits", of_group.get("num_bits")),
        "type": declared.get("bnb_4bit_quant_type") if declared.get("load_in_4bit") else None,
        "8 bits": declared.get("load_in_8bit") or None,
        "group": declared.get("group_size", of_group.get("group_size")),
        "format": declared.get("format") or declared.get("fmt"),
    }
    told = ", ".join(f"{name} {value}" if value is not True else name for name, value in given.items() if value is not None)
    return f"{method_of(declared)} ({told})" if told else method_of(declared)


def why_not(declared: dict[str, Any], error: Exception) -> str:
    """Why a quantized checkpoint was not loaded: a package that is missing, or a GPU."""
    method, said = method_of(declared), described(error)
    modules, install = NEEDS.get(method, ((), ""))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    why = f"its weights are quantized by {shown(declared)}"
    if missing:
        return f"{why}, which needs {' and '.join(missing)}: pip install {install!r} ({said})"
    if not torch.cuda.is_available() and any(word in said for word in ("GPU", "CUDA", "cuda")):
        return f"{why}, which needs a GPU, and torch {torch.__version__} sees none here ({said})"
    return f"{why}, and transformers could not read them: {said}"
