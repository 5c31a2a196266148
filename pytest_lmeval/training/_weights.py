"""Copy a model, and move its weights to and from safetensors files."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pytest_lmeval.errors import SpecError, UnreadableError, described, some
from pytest_lmeval.models._identity import architecture_of
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._sources import load
from pytest_lmeval.models._tensors import is_packed, precision_of

BEST = "best.safetensors"
SENT = "model.safetensors"
"""The weights in the folder of a training, and in a repository that `lmeval push` sent them to."""


def load_weights(lm: Model | str, path: str | Path, *, partial: bool = False) -> Model:
    """A copy of a model (or of that of a spec) with the weights that `train` wrote: best.safetensors, or its folder; or with
    those of a folder that `lmeval push` sent, in one file or in shards.

    partial  the file holds no frozen parameters, and those of the model stay

    Raises SpecError if the file is missing or broken, or does not fit; it names the tensors and settings that differ.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    for file in _files(Path(path)):
        try:
            with safe_open(file, framework="pt") as content:
                tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
                about = content.metadata() or {}
        except FileNotFoundError as error:
            raise UnreadableError(f"there are no weights at {file}.") from error
        except (SafetensorError, OSError) as error:
            raise UnreadableError(f"{file} is no whole file of weights ({error}); it was probably cut off.") from error
    model = copy_of(load(lm) if isinstance(lm, str) else lm, partial=partial)
    source = f"{file} (weights of {about['spec']})" if "spec" in about else str(file)
    fill(model, tensors, source, partial=partial)
    if "architecture" in about:
        _check_architecture(model, json.loads(about["architecture"]), source)
    return replace(model, spec=about.get("spec", f"{model.spec}, weights of {file.name}"))


def _files(path: Path) -> list[Path]:
    """The files of the weights at a path."""
    if not path.is_dir():
        return [path]
    index = path / f"{SENT}.index.json"
    if not (path / BEST).exists() and index.exists():
        try:
            names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UnreadableError(f"{index} does not name the files of the weights ({described(error)}).") from error
        return [path / name for name in sorted(names)]
    return [path / (SENT if not (path / BEST).exists() and (path / SENT).exists() else BEST)]


def copy_of(lm: Model, *, partial: bool = False) -> Model:
    """The model with a copy of its module, in eval mode; `partial` copies share its frozen parameters.

    Raises SpecError if there is no module to copy.
    """
    if lm.module is None or lm.rebuild is None:
        raise SpecError(f"{lm.spec} is no torch module, so there are no weights to train or to load.")
    if packed := {precision_of(tensor) for tensor in lm.module.parameters() if is_packed(tensor)}:
        raise SpecError(
            f"{lm.spec} holds weights that are packed ({', '.join(sorted(packed))}). They have no gradient, and updates are "
            "smaller than their rounding. Train the unpacked model, and pack the result."
        )
    shared = {id(tensor): tensor for tensor in lm.module.parameters() if partial and not tensor.requires_grad}
    try:
        module = copy.deepcopy(lm.module, shared).eval()
    except Exception as error:  # a module may hold anything
        why = f"{type(error).__name__}: {error}"
        raise SpecError(f"{lm.spec} cannot be copied ({why}), and only a copy is trained, to keep the given one.") from error
    own = lm.source is lm.module
    return replace(
        lm,
        module=module,
        step_fn=lm.rebuild(module),
        compiled="",
        source=module if own else lm.source,
        fast_weights=getattr(module, "fast_weights", None) if own and lm.fast_weights else lm.fast_weights,
    )


def snapshot(lm: Model, *, partial: bool = False) -> dict[str, Tensor]:
    """A copy of the model's tensors on the CPU, without those that hold its state, and if `partial` without frozen parameters;
    tied weights under their first name."""
    return {names[0]: tensor.detach().to("cpu", copy=True).contiguous() for names, tensor in _tensors(lm, partial)}


def fill(lm: Model, tensors: dict[str, Tensor], source: str, *, partial: bool = False) -> None:
    """Put tensors into the model's module. Raises SpecError, leaving the model as before, if they are not exactly its own (if
    `partial`, those of its own that are not frozen)."""
    assert lm.module is not None
    own = _tensors(lm, partial)
    shapes = {name: tensor.shape for names, tensor in own for name in names}
    wrong = {
        "missing": [names[0] for names, _ in own if not any(name in tensors for name in names)],
        "not in the model": [name for name in tensors if name not in shapes],
        "of another shape": [
            f"{name} {list(tensor.shape)} for {list(shapes[name])}"
            for name, tensor in tensors.items()
            if tensor.shape != shapes.get(name, tensor.shape)
        ],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names)
        whose = "These weights belong to another model, or to another size of it; protocol.json beside such a file names it."
        raise SpecError(f"{source} does not fit {lm.spec}. Tensors {listed}. {whose}")
    lm.module.load_state_dict(tensors, strict=False)  # a file holds tied tensors once


def _check_architecture(lm: Model, trained: dict[str, str | None], source: str) -> None:
    """Raise SpecError if weights that fit were trained with other settings: another window, another number of heads."""
    own = architecture_of(lm)
    fixed = {name for name in {*own, *trained} if trained.get(name, "") is not None}
    if other := [name for name in sorted(fixed) if own.get(name) != trained.get(name)]:
        listed = [f"{name} {trained.get(name, 'not set')} there, {own.get(name, 'not set')} here" for name in other]
        why = f"its tensors do, but its settings differ ({some(listed)}), which gives other numbers"
        raise SpecError(f"{source} does not fit {lm.spec}: {why}. Load the weights into the model that was trained.")


def _tensors(lm: Model, partial: bool = False) -> list[tuple[list[str], Tensor]]:
    """The tensors of the module's state dict that reading does not change, each with all of its names; if `partial`, without
    frozen parameters."""
    assert lm.module is not None
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in lm.module.state_dict(keep_vars=True).items():
        frozen = partial and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if isinstance(tensor, Tensor) and name not in lm.mutable_buffers and not frozen:
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())
