"""The copy of a model that is trained; the model itself is never changed."""

from __future__ import annotations

import copy
from dataclasses import replace

from pytest_lmeval.errors import SpecError
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._tensors import is_packed, precision_of


def copy_of(lm: Model) -> Model:
    """The same model with a module of its own, in eval mode. Raises SpecError where there is none to copy."""
    if lm.module is None or lm.rebuild is None:
        raise SpecError(f"{lm.spec} is no torch module, so there are no weights to train or to load.")
    if packed := {precision_of(tensor) for tensor in lm.module.parameters() if is_packed(tensor)}:
        raise SpecError(
            f"{lm.spec} holds weights that are packed ({', '.join(sorted(packed))}). They have no gradient, and a step of "
            "training is smaller than what they are rounded to. Train the model as it was before, and pack what comes out."
        )
    try:
        module = copy.deepcopy(lm.module).eval()
    except Exception as error:  # a module may hold anything
        raise SpecError(
            f"{lm.spec} cannot be copied ({type(error).__name__}: {error}), and what is trained is a copy, so that the model "
            "that was given stays as it is."
        ) from error
    own = lm.source is lm.module
    return replace(
        lm,
        module=module,
        step_fn=lm.rebuild(module),
        source=module if own else lm.source,
        fast_weights=getattr(module, "fast_weights", None) if own and lm.fast_weights else lm.fast_weights,
    )
