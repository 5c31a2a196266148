"""Write and read the files of a perplexity measurement: checkpoints, the loss of every target, and the sums of units.

Two runs are compared unit by unit, so a unit is named by its content: a document by its text, a block of a stream by the whole
text and the tokens and bytes of it that it covers, so that blocks of different tokenizers have different names.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pkgutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch

from pytest_lmeval.engine._engine import Engine
from pytest_lmeval.models._model import Model, state_types
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Unit
from pytest_lmeval.records._journal import Checkpoints
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.scoring._loss_accumulator import BYTES, TOKENS, UNIT_COLUMNS, LossAccumulator


def write_checkpoint(checkpoints: Checkpoints, key: str, sums: LossAccumulator) -> None:
    """Save the sums and the state after a chunk. Raises OSError, also for a state that cannot be saved."""
    saved = {"sums": json.dumps(sums.to_json()), "state": sums.state}
    try:
        checkpoints.write(key, lambda file: torch.save(saved, file))
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
        raise OSError(f"its state raises {type(error).__name__}: {error}") from error


def read_checkpoint(checkpoints: Checkpoints | None, key: str, lm: Model) -> LossAccumulator | None:
    """The saved sums with their state, or None if there are none that can be used."""

    def load(file: IO[bytes]) -> LossAccumulator:
        saved = safe_load(file.read(), lm)
        return replace(LossAccumulator.from_json(json.loads(saved["sums"])), state=saved["state"])

    return None if checkpoints is None else checkpoints.read(key, load)


def safe_load(content: bytes, lm: Model) -> Any:
    """Unpickle tensors, plain values, and the classes of which a state of `lm` consists: a file in the output folder may come
    from anywhere (a cache, an artefact), so it must not be able to run code."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    allowed: list[Any] = []
    if names:
        _, state = Engine(lm).step(lm.random_ids(1, 1))
        own = state_types(state)
        allowed = [found for name in names if (found := _class(name)) in own]
    with torch.serialization.safe_globals(allowed):
        return torch.load(io.BytesIO(content), map_location=lm.device, weights_only=True)


def _class(name: str) -> type | None:
    """The class of exactly this name; None for anything else that the name resolves to."""
    found = pkgutil.resolve_name(name)
    return found if isinstance(found, type) and f"{found.__module__}.{found.__qualname__}" == name else None


class LossFile:
    """Appends float32 losses to a .npy file that holds `already` losses of an interrupted run (later ones are dropped), and
    rewrites the header at the end; writes nothing if `path` is None."""

    def __init__(self, path: str | Path | None, *, already: int = 0) -> None:
        self.path, self.count = path, already

    @staticmethod
    def holds(path: str | Path | None, count: int) -> bool:
        """Whether the file at `path` has the first `count` losses; True if `path` is None."""
        return path is None or (Path(path).exists() and Path(path).stat().st_size >= len(_header(0)) + 4 * count)

    def __enter__(self) -> LossFile:
        if self.path is not None:
            self.file = open(self.path, "r+b" if self.count else "w+b")
            self._write_header()
            self.file.truncate(len(_header(0)) + 4 * self.count)
            self.file.seek(0, os.SEEK_END)
        return self

    def write(self, nll: np.ndarray) -> None:
        if self.path is not None:
            self.file.write(nll.astype("<f4").tobytes())
            self.count += len(nll)

    def sync(self) -> None:
        """Force the losses to the disk."""
        if self.path is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.path is not None:
            self._write_header()
            self.file.close()

    def _write_header(self) -> None:
        self.file.seek(0)
        self.file.write(_header(self.count))


def _header(count: int) -> bytes:
    """A header of the same length for any count: numpy pads it for growth."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    return buffer.getvalue()


def write_units(path: str | Path, sums: LossAccumulator) -> None:
    """Write the units that hold a target, in order: sums of tokens, nats, bytes, and targets among the first choices."""
    names = sums.documents if sums.by_document else _block_names(sums)
    units = [
        Unit(name, {column: _plain(unit[index]) for column, index in UNIT_COLUMNS.items()})
        for name, unit in zip(names, sums.units, strict=True)
        if unit[TOKENS]
    ]
    with replacing(Path(path)) as new:
        new.write_text("".join(map(schema.line_of, units)), encoding="utf-8")


def _block_names(sums: LossAccumulator) -> list[str]:
    sizes = np.array(sums.units)[:, [TOKENS, BYTES]].astype(int)
    begins = np.cumsum(sizes, axis=0) - sizes
    (text,) = sums.documents
    contents = (f"{text} {begin.tolist()} {size.tolist()}" for begin, size in zip(begins, sizes, strict=True))
    return [hashlib.sha256(content.encode()).hexdigest()[:16] for content in contents]


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else float(value)
