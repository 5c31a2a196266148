"""Weights of a module in a safetensors file: written whole or not at all, and loaded only where every tensor has its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pytest_lmeval.errors import SpecError, UnreadableError
from pytest_lmeval.models._identity import architecture_of
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._sources import load
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.training._trainee import copy_of

MENTIONED = 5  # names of tensors in an error, of those that are wrong in the same way


def load_weights(lm: Model | str, path: str | Path) -> Model:
    """A copy of a model (or the model that a spec names) with the weights that `train` left at `path`.

    path  a file best.safetensors, or the folder that holds one

    Raises SpecError where the file is not there or is broken, and where it does not fit: with the names of the tensors that are
    missing, that the model does not have, or that have other shapes, and with the settings that are other ones.
    """
    file = Path(path) / "best.safetensors" if Path(path).is_dir() else Path(path)
    tensors, about = read_weights(file)
    model = copy_of(load(lm) if isinstance(lm, str) else lm)
    source = f"{file} (weights of {about['spec']})" if "spec" in about else str(file)
    fill(model, tensors, source)
    if "architecture" in about:
        same_architecture(model, json.loads(about["architecture"]), source)
    return replace(model, spec=about.get("spec", f"{model.spec}, weights of {file.name}"))


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and what was written about them."""
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UnreadableError(f"there are no weights at {file}.") from error
    except (SafetensorError, OSError) as error:
        raise UnreadableError(f"{file} is no whole file of weights ({error}); it was probably cut off.") from error


def write_weights(file: Path, tensors: dict[str, Tensor], **about: str) -> None:
    with replacing(file) as new:
        save_file(tensors, new, metadata=about)


def snapshot(lm: Model) -> dict[str, Tensor]:
    """A copy of the model's tensors on the CPU, those that hold its state left out. One that has several names (tied weights)
    stands under the first."""
    return {names[0]: tensor.detach().to("cpu", copy=True).contiguous() for names, tensor in _tensors(lm)}


def fill(lm: Model, tensors: dict[str, Tensor], source: str) -> None:
    """Put tensors into the model's module. Raises SpecError, the model being as before, where they are not exactly its own."""
    assert lm.module is not None
    own = _tensors(lm)
    shapes = {name: tensor.shape for names, tensor in own for name in names}
    wrong = {
        "missing": [names[0] for names, _ in own if not any(name in tensors for name in names)],
        "not in the model": [name for name in tensors if name not in shapes],
        "of another shape": [
            f"{name} {list(tensor.shape)} for {list(shapes[name])}"
            for name, tensor in tensors.items()
            if name in shapes and tensor.shape != shapes[name]
        ],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in wrong.items() if names)
        raise SpecError(
            f"{source} does not fit {lm.spec}. Tensors {listed}. These are weights of another model, or "
            "of another size of it; protocol.json beside such a file says of which."
        )
    lm.module.load_state_dict(tensors, strict=False)  # tied tensors stand in the file once


def same_architecture(lm: Model, trained: dict[str, str | None], source: str) -> None:
    """Raises SpecError where weights that fit are those of another model: of one with a window, say, or with other heads."""
    own = architecture_of(lm)
    fixed = {name for name in {*own, *trained} if trained.get(name, "") is not None}
    if other := [name for name in sorted(fixed) if own.get(name) != trained.get(name)]:
        listed = [f"{name} {trained.get(name, 'not set')} there, {own.get(name, 'not set')} here" for name in other]
        raise SpecError(
            f"{source} does not fit {lm.spec}: its tensors do, but it was trained with other settings ({_some(listed)}). Read "
            "by this model, its weights would say something else than what they learnt. Load them into the model they are of."
        )


def _tensors(lm: Model) -> list[tuple[list[str], Tensor]]:
    """The tensors of the module's state dict that reading does not change, each with all of its names."""
    assert lm.module is not None
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in lm.module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and name not in lm.mutable_buffers:
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _some(names: list[str]) -> str:
    return ", ".join(names[:MENTIONED]) + (f" and {len(names) - MENTIONED} more" if len(names) > MENTIONED else "")
