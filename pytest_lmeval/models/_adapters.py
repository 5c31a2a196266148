"""Put a PEFT adapter over a transformers model: all of its tensors, in their shapes, or an error.

peft itself ignores tensors that the model has no place for, and fills those that the adapter lacks with initial values.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from pytest_lmeval.errors import SpecError, described, some
from pytest_lmeval.models._hub import HubCall


def put_over(module: nn.Module, adapter: str, spec: str, *, dtype: torch.dtype | None) -> tuple[nn.Module, str]:
    """The model with the adapter in its layers, unmerged, and what the adapter is, for the record.

    dtype  that of the adapter's weights; None: float32 where the model has 16 bits, as peft trains them

    Raises SpecError without peft, for an adapter of another model, and for kinds that are not put into layers.
    """
    try:
        import peft
    except ImportError as error:
        raise SpecError(f"{spec}: an adapter needs peft: pip install 'pytest-lmeval[adapters]'") from error
    base = getattr(getattr(module, "config", None), "name_or_path", "") or type(module).__name__
    try:
        with HubCall(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tensors are missing is refused below; others are peft's own affairs
            config: Any = peft.PeftConfig.from_pretrained(adapter)
            saved = peft.load_peft_weights(adapter, device="cpu")
            if config.is_prompt_learning:
                raise SpecError(
                    f"{spec}: {adapter} is a {_kind(config)} adapter, which puts tokens before the text and not weights into "
                    "layers. Such adapters are not supported: LoRA and others that change layers are."
                )
            wrapped: Any = peft.PeftModel.from_pretrained(
                module, adapter, config=config, autocast_adapter_dtype=dtype is None, ignore_mismatched_sizes=True
            )
            own = peft.get_peft_model_state_dict(wrapped)
    except SpecError:
        raise
    except Exception as error:  # a damaged file, or an adapter whose layers the model does not have
        wanted = f" It was trained on {named}." if (named := _base_of(locals().get("config"))) else ""
        raise SpecError(f"{spec}: the adapter {adapter} cannot be put over {base}: {described(error)}.{wanted}") from error
    _refuse_other(spec, adapter, base, config, saved, own)
    model: nn.Module = wrapped.get_base_model()
    if dtype is not None:
        model.to(dtype)
    rank = f", rank {config.r}" if getattr(config, "r", None) else ""
    trained = f", trained on {_base_of(config)}" if _base_of(config) else ""
    return model.requires_grad_(False).eval(), f"{adapter} ({_kind(config)}{rank}{trained})"


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _base_of(config: Any) -> str:
    return str(getattr(config, "base_model_name_or_path", None) or "")


def _refuse_other(spec: str, adapter: str, base: str, config: Any, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise SpecError unless the tensors of the adapter's file are those that it has over this model."""
    wrong = [
        f"{name} {list(saved[name].shape)} for {list(own[name].shape)}"
        for name in sorted(saved.keys() & own.keys())
        if saved[name].shape != own[name].shape
    ]
    extra, missing = sorted(saved.keys() - own.keys()), sorted(own.keys() - saved.keys())
    if not (wrong or extra or missing):
        return
    listed = "; ".join(
        f"{what}: {some(names)}"
        for what, names in (("of another shape", wrong), ("no place for", extra), ("missing", missing))
        if names
    )
    trained = f" It was trained on {_base_of(config)}." if _base_of(config) else ""
    raise SpecError(
        f"{spec}: the adapter {adapter} is of another model than {base}. Of its {len(saved)} tensors and the {len(own)} that "
        f"it would have over this one, {listed}.{trained} Name the model that it was trained on."
    )
