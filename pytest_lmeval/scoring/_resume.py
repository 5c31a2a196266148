"""Saved points of a reading: how they are written while it goes on, and how they are read without trusting them."""

from __future__ import annotations

import io
import json
import pkgutil
from dataclasses import dataclass
from typing import IO, Any

import torch

from pytest_lmeval.engine._engine import Engine
from pytest_lmeval.models._model import Model, State, state_types
from pytest_lmeval.records._journal import Checkpoints
from pytest_lmeval.scoring._reading import Reading


@dataclass(frozen=True)
class Point:
    """A place in a corpus between two chunks: enough to go on from there with the same final numbers.

    document  documents before the current one
    scored    the last target of the current sequence that was scored: also the last token but one that was read
    window    where the current window begins
    """

    reading: Reading
    document: int = 0
    scored: int = 0
    window: int = 0
    state: State = None
    seconds: float = 0.0


def write_point(checkpoints: Checkpoints, key: str, point: Point) -> None:
    """Save a point. Raises OSError, and what a state raises that cannot be saved."""
    place = {name: getattr(point, name) for name in ("document", "scored", "window", "seconds")}
    meta = json.dumps({**place, "reading": point.reading.to_json()})
    checkpoints.write(key, lambda file: torch.save({"meta": meta, "state": point.state}, file))


def read_point(checkpoints: Checkpoints | None, key: str, lm: Model) -> Point | None:
    """The saved point, or None if there is none that can be used."""
    found: Point | None = None if checkpoints is None else checkpoints.read(key, lambda file: load_point(file, lm))
    return found


def load_point(file: IO[bytes], lm: Model) -> Point:
    """The point in a file that `write_point` wrote."""
    saved = safe_load(file.read(), lm)
    meta = json.loads(saved["meta"])
    return Point(Reading.from_json(meta.pop("reading")), state=saved["state"], **meta)


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
