"""Saved points of a reading: how they are written while it goes on, and how they are read without trusting them."""

from __future__ import annotations

import io
import json
import pickle
import pkgutil
from dataclasses import replace
from typing import IO, Any

import torch

from pytest_lmeval.engine._engine import Engine
from pytest_lmeval.models._model import Model, state_types
from pytest_lmeval.records._journal import Checkpoints
from pytest_lmeval.scoring._loss_accumulator import LossAccumulator


def write_point(checkpoints: Checkpoints, key: str, reading: LossAccumulator) -> None:
    """Save a reading between two chunks. Raises OSError, also for a state that cannot be saved."""
    saved = {"reading": json.dumps(reading.to_json()), "state": reading.state}
    try:
        checkpoints.write(key, lambda file: torch.save(saved, file))
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
        raise OSError(f"its state raises {type(error).__name__}: {error}") from error


def read_point(checkpoints: Checkpoints | None, key: str, lm: Model) -> LossAccumulator | None:
    """The reading that was saved, or None if there is none that can be used."""

    def load(file: IO[bytes]) -> LossAccumulator:
        saved = safe_load(file.read(), lm)
        return replace(LossAccumulator.from_json(json.loads(saved["reading"])), state=saved["state"])

    found: LossAccumulator | None = None if checkpoints is None else checkpoints.read(key, load)
    return found


def safe_load(content: bytes, lm: Model) -> Any:
    """Unpickle what `torch.save` wrote: tensors, plain values, and the classes that a state of `lm` is made of.

    A file in the output folder may come from anywhere (a cache, an artefact): it must not be able to run code.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    allowed: list[Any] = []
    if names:
        _, state = Engine(lm).step(lm.random_ids(1, 1))
        own = state_types(state)
        allowed = [found for name in names if (found := _class(name)) in own]
    with torch.serialization.safe_globals(allowed):
        return torch.load(io.BytesIO(content), map_location=lm.device, weights_only=True)


def _class(name: str) -> type | None:
    """The class of exactly this name; None for anything else that the name may lead to."""
    found = pkgutil.resolve_name(name)
    return found if isinstance(found, type) and f"{found.__module__}.{found.__qualname__}" == name else None
