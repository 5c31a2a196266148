"""Place a transformers model on devices and choose its attention: keywords for `from_pretrained`, and facts for the record."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections import Counter
from typing import Any

import torch
from torch import nn

from pytest_lmeval.errors import SpecError, nearest
from pytest_lmeval.models import _gguf as gguf, _quantization as quantization
from pytest_lmeval.models._hf_source import Source
from pytest_lmeval.models._hub import HubCall

ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def keywords(spec: str, device_map: str, tp_plan: str, device: torch.device | None) -> dict[str, Any]:
    """The keywords that place the weights; empty if they are loaded on the CPU and moved.

    device  where all of them are to be placed, if no option says otherwise; None: nowhere

    Raises SpecError without accelerate, and for a plan outside of torchrun.
    """
    if device_map and tp_plan:
        raise SpecError(f"{spec}: device_map= spreads whole layers, tp_plan= splits each of them; choose one.")
    accelerate = importlib.util.find_spec("accelerate") is not None
    if device_map:
        if not accelerate:
            raise SpecError(f"{spec}: device_map= needs accelerate: pip install 'pytest-lmeval[devices]'")
        return {"device_map": device_map}
    if tp_plan:
        ranks = int(os.environ.get("WORLD_SIZE", "0"))
        if not ranks or "RANK" not in os.environ:
            raise SpecError(
                f"{spec}: tp_plan= splits each layer over the processes that torchrun starts, and this one was not started by "
                "it. Run `torchrun --nproc-per-node N -m pytest ...`, or write device_map=auto for one process."
            )
        try:
            distributed: Any = importlib.import_module("transformers.distributed")
            config = distributed.DistributedConfig(tp_plan=tp_plan, tp_size=ranks)
        except (ImportError, AttributeError):  # older versions of transformers
            return {"tp_plan": tp_plan}
        return {"distributed_config": config}
    return {"device_map": {"": device}} if device is not None and accelerate else {}


def attention(spec: str, wanted: str) -> dict[str, Any]:
    """The keyword for an attention implementation. Raises SpecError for an unknown one, or one whose package is missing."""
    if not wanted:
        return {}
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    if wanted not in known and "/" not in wanted:  # OWNER/NAME is a kernel of the hub
        raise SpecError(
            f"{spec}: transformers has no attention {wanted!r}; there are: {', '.join(known)}.{nearest(wanted, known)}"
        )
    package = ATTENTION_PACKAGES.get(wanted)
    if package and importlib.util.find_spec(package) is None and importlib.util.find_spec("kernels") is None:
        raise SpecError(f"{spec}: attn={wanted} needs the package {package}, or kernels, and a GPU. attn=sdpa needs neither.")
    return {"attn_implementation": wanted}


def refuse_elsewhere(spec: str, module: nn.Module) -> None:
    """Raise SpecError if weights were left outside of the devices: they can be neither identified nor copied."""
    left = [name for name, tensor in module.named_parameters() if tensor.device.type == "meta"]
    if left:
        places = Counter(map(str, getattr(module, "hf_device_map", {}).values()))
        raise SpecError(
            f"{spec}: the devices are too small: {len(left)} tensors, {left[0]} first, were left on the CPU or the disk, to be "
            f"copied at each step ({', '.join(f'{n} parts on {place}' for place, n in places.items())}). Such a model is not "
            "identified or tested. Use more devices, a smaller precision, or the CPU alone."
        )


def facts_of(module: nn.Module, source: Source, declared: dict[str, Any], attn: str) -> dict[str, str]:
    """What was loaded and how, for the record. `revision` is the commit that the hub gave."""
    config: Any = module.config
    found: dict[str, str] = {}
    if revision := source.keywords.get("revision"):
        found["revision"] = str(getattr(config, "_commit_hash", None) or _commit(source.name, revision))
    if method := quantization.shown(declared):
        found["quantization"] = method
    if file := source.keywords.get("gguf_file"):
        found["gguf"] = file
        if source.folder is not None:
            found["gguf"] += f": {gguf.holds(source.folder / file)}"
    if attn:
        found["attention"] = attn
    mesh = getattr(module, "_device_mesh", None)
    if mesh is not None:
        found["devices"] = f"each layer split over {os.environ.get('WORLD_SIZE')} ranks"
    places = Counter(map(str, (getattr(module, "hf_device_map", None) or {}).values()))
    if mesh is None and len(places) > 1:
        found["devices"] = ", ".join(f"{n} parts on {place}" for place, n in places.items())
    return found


def _commit(name: str, revision: str) -> str:
    """The commit of a revision, which some versions of transformers do not tell; the revision if the hub is not there."""
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception), HubCall():
        return HfApi().model_info(name, revision=revision).sha or revision
    return revision
