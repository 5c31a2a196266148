"""Check the checkpoint of a transformers model: what it says of its size, damaged files, weights that are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pytest_lmeval.errors import SpecError, some
from pytest_lmeval.models._free_memory import free_bytes
from pytest_lmeval.records._journal import warn


def check_layers(config: Any, folder: Path) -> None:
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


def announce_large(spec: str, folder: Path) -> None:
    """Warn if the weights in a folder are larger than the free memory: the system may kill the process that loads them."""
    size, free = sum(file.stat().st_size for file in folder.glob("*.safetensors")), free_bytes(torch.device("cpu"))
    if free is not None and size > free:
        warn(f"{spec}: its weights take {size:,} bytes on the disk, and {free:,} are free in memory; loading them may fail.")


def unreadable_files(folder: Path) -> list[str]:
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


def refuse_incomplete(spec: str, report: dict[str, Any]) -> None:
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
