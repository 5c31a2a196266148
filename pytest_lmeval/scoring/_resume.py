"""Saved points of a reading: how they are written while it goes on, and how they are read without trusting them."""

from __future__ import annotations

import io
import json
import pickle
import pkgutil
import time
from collections.abc import Callable
from typing import IO, Any

import torch

from pytest_lmeval.models._model import Model, state_types
from pytest_lmeval.records._journal import Checkpoints, warn
from pytest_lmeval.scoring._plan import Point
from pytest_lmeval.scoring._reading import Reading


class Saver:
    """Saves a point every two seconds, or less often where that would take more than one percent of the time."""

    PAUSE, SHARE = 2.0, 100.0

    def __init__(self, checkpoints: Checkpoints | None, key: str) -> None:
        self.checkpoints, self.key = checkpoints, key
        self.next = time.perf_counter() + self.PAUSE

    def save_now_and_then(self, point: Point, sync: Callable[[], None]) -> None:
        """Save `point` if it is time; `sync` first brings to the disk what the point relies on."""
        if self.checkpoints is None or time.perf_counter() < self.next:
            return
        began = time.perf_counter()
        place = {name: getattr(point, name) for name in ("document", "opened", "scored", "window", "seconds")}
        meta = json.dumps({**place, "reading": point.reading.to_json()})

        def save(file: IO[bytes]) -> None:
            torch.save({"meta": meta, "state": point.state}, file)

        try:
            sync()
            self.checkpoints.write(self.key, save)
        except (OSError, pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
            self.checkpoints = None
            warn(
                f"no point to go on from can be saved ({type(error).__name__}: {error}); the reading itself goes on. If it is "
                "interrupted, it begins anew."
            )
        took = time.perf_counter() - began
        self.next = time.perf_counter() + max(self.PAUSE, self.SHARE * took)

    def load(self, lm: Model) -> Point | None:
        """The saved point, or None if there is none that can be used."""
        if self.checkpoints is None:
            return None
        found: Point | None = self.checkpoints.read(self.key, lambda file: load_point(file, lm))
        return found


def load_point(file: IO[bytes], lm: Model) -> Point:
    """The point in a file that `Saver` wrote."""
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
        with torch.no_grad():
            _, state = lm.step(lm.random_ids(1, 1))
        own = state_types(state)
        allowed = [found for name in names if (found := _class(name)) in own]
    with torch.serialization.safe_globals(allowed):
        return torch.load(io.BytesIO(content), map_location=lm.device, weights_only=True)


def _class(name: str) -> type | None:
    """The class of exactly this name; None for anything else that the name may lead to."""
    found = pkgutil.resolve_name(name)
    return found if isinstance(found, type) and f"{found.__module__}.{found.__qualname__}" == name else None
