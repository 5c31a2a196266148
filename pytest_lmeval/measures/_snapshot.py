"""Keep tensors of a model for the time of a block, so that an experiment that changes them is undone: `with snapshot(...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pytest_lmeval.errors import ArgumentError
from pytest_lmeval.measures._context import current, shared_verb
from pytest_lmeval.models._snapshot import Snapshot


@shared_verb
def snapshot(lm: Any, *patterns: str, on: str | Path = "cpu") -> Snapshot:
    """Keep the tensors of these names, and put them back, bit for bit, at the end of the block, also after an exception.

        with snapshot(lm, "*.o_proj.weight") as kept:
            ...                                          change them, evaluate
            kept.restore()                               put them back before the end

    Parameters and buffers that were replaced, with the modules around them, are put back as the same objects, so tied tensors
    stay tied. Packed tensors (torchao, bitsandbytes) are kept with their scales, and of those that are split over several
    ranks each rank keeps its part.

    lm        a torch module, a `Model`, or in a test a spec
    patterns  names of tensors, "model.embed_tokens.weight", or patterns, "*.o_proj.weight"
    on        where the copies are: "cpu", "device", or a file, which is replaced, and stays there

    Raises ArgumentError for a pattern that matches nothing, with the nearest names, and for an object that is no torch module.
    """
    context = current()
    if isinstance(lm, str) and context.session.folder is None:
        raise ArgumentError(
            f"snapshot({lm!r}) outside of a test would keep the tensors of a model that is loaded for it alone. Load it first, "
            f"lm = load({lm!r}), and give it to both."
        )
    model = None if isinstance(lm, nn.Module) else context.model(lm)
    module = lm if model is None else model.module
    if module is None:
        raise ArgumentError(f"{model!r} is no torch module, so it has no tensors to keep.")
    if not patterns:
        raise ArgumentError('no tensor is named: snapshot(lm, "*.o_proj.weight"); "*" keeps all.')
    return Snapshot(module, patterns, on, type(module).__name__ if model is None else model.spec)
