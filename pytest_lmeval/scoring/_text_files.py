"""Write and read the files of a perplexity measurement: checkpoints, the loss of every target, and the sums of units.

Two runs are compared unit by unit, so a unit is named by its content: a document by its text, a block of a stream by the whole
text and the tokens and bytes of it that it covers, so that blocks of different tokenizers have different names.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch

from pytest_lmeval.engine._engine import Engine
from pytest_lmeval.errors import some
from pytest_lmeval.models._model import Model, state_types
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Unit
from pytest_lmeval.records._journal import Checkpoints, replace_or_warn, warn
from pytest_lmeval.records._replacing import appending, regular
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
    """Unpickle tensors, plain values, and the classes that a state of `lm` consists of: a file in the output folder may come
    from anywhere (a cache, an artefact), so it must not be able to run code.

    No name in the file is looked up: it is compared with the names of those classes, which the model has imported.
    """
    named = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    own = _classes_of_state(lm) if named else {}
    if foreign := [name[:60] for name in sorted(named) if name not in own]:
        raise ValueError(f"it names {some(list(map(repr, foreign)))}, and no state of {lm.spec} consists of that")
    with torch.serialization.safe_globals([*own.values()]):
        return torch.load(io.BytesIO(content), map_location=lm.device, weights_only=True)


def _classes_of_state(lm: Model) -> dict[str, type]:
    """By name, the classes that saving a state of one token names; of functions, only those that torch allows anyway are
    called."""
    _, state = Engine(lm).step(lm.random_ids(1, 1))
    file = io.BytesIO()
    torch.save(state, file)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(file.getvalue()))
    classes = {f"{own.__module__}.{own.__qualname__}": own for own in state_types(state)}
    return {name: classes[name] for name in named if name in classes}


class LossFile:
    """Appends float32 losses to a .npy file that holds `already` losses of an interrupted run (later ones are dropped), and
    rewrites the header at the end; writes nothing if `path` is None. If it cannot be written, warns, deletes it and goes on."""

    def __init__(self, path: str | Path | None, *, already: int = 0) -> None:
        self.path, self.count = None if path is None else Path(path), already

    @staticmethod
    def holds(path: str | Path | None, count: int) -> bool:
        """Whether the file at `path` has the first `count` losses; True if `path` is None."""
        try:
            return path is None or regular(Path(path)).stat().st_size >= len(_header(0)) + 4 * count
        except OSError:
            return False

    def __enter__(self) -> LossFile:
        with self._or_without():
            if self.path is not None:
                self.file = appending(self.path, "r+b" if self.count else "w+b")
                self._write_header()
                self.file.truncate(len(_header(0)) + 4 * self.count)
                self.file.seek(0, os.SEEK_END)
        return self

    def write(self, nll: np.ndarray) -> None:
        with self._or_without():
            if self.path is not None:
                self._write(nll.astype("<f4").tobytes())
                self.count += len(nll)

    def sync(self) -> None:
        """Force the losses to the disk."""
        with self._or_without():
            if self.path is not None:
                os.fsync(self.file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._or_without():
            if self.path is not None:
                self._write_header()
                self.file.close()

    def _write_header(self) -> None:
        self.file.seek(0)
        self._write(_header(self.count))

    def _write(self, raw: bytes) -> None:
        if (written := self.file.write(raw)) != len(raw):
            raise OSError(errno.ENOSPC, f"only {written} of {len(raw)} bytes were written", str(self.path))

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """Write nothing more after an error, and leave no file, which would pass for a whole one."""
        try:
            yield
        except OSError as error:
            warn(f"{self.path} cannot be written ({error.strerror or error}): the losses of this text are not kept.")
            with suppress(OSError, AttributeError):  # it may never have been opened
                self.file.close()
            if self.path is not None:
                with suppress(OSError):
                    self.path.unlink()
            self.path = None


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
    replace_or_warn(Path(path), "".join(map(schema.line_of, units)))


def _block_names(sums: LossAccumulator) -> list[str]:
    sizes = np.array(sums.units)[:, [TOKENS, BYTES]].astype(int)
    begins = np.cumsum(sizes, axis=0) - sizes
    (text,) = sums.documents
    contents = (f"{text} {begin.tolist()} {size.tolist()}" for begin, size in zip(begins, sizes, strict=True))
    return [hashlib.sha256(content.encode()).hexdigest()[:16] for content in contents]


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else float(value)
