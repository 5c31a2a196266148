"""The files of one training, in a folder named by the key of everything that decides its outcome:

    protocol.json      what decides it: protocol, model, texts, tokenizer, version of this package
    point.pt           what it can go on from, until it is finished
    best.safetensors   the best weights so far
    record.json        the record, once it is finished

Each is replaced in one move, so that a process may be killed at any time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from pytest_lmeval.errors import UnreadableError
from pytest_lmeval.models._model import Model
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import Checkpoints, warn
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.training._run import Run, resume
from pytest_lmeval.training._weights import load_weights, write_weights

POINT = "point"


@dataclass(frozen=True)
class Folder:
    """See the head of this file."""

    path: Path

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def begin(self, identity: dict[str, Any]) -> None:
        """Write down what is trained here. Raises OSError now, before the work, if nothing can be written after it."""
        with replacing(self.path / "protocol.json") as new:
            new.write_text(json.dumps(identity, indent=1, default=str))

    def resume(self, new: Callable[[], Run]) -> Run:
        """A new run, brought to where it was last saved, if it was and that can be read."""

        def load(file: IO[bytes]) -> Run:
            return resume(new(), torch.load(file, map_location="cpu", weights_only=True))

        run: Run | None = Checkpoints(self.path).read(POINT, load)
        return run or new()

    def save(self, run: Run) -> None:
        """The run as a point to go on from, and its best weights so far as a file for everybody."""
        point = run.to_point()
        Checkpoints(self.path).write(POINT, lambda file: torch.save(point, file))
        self.save_best(run)

    def save_best(self, run: Run) -> None:
        if run.best:
            about = {"spec": run.best_spec, "step": str(run.best_step), "architecture": json.dumps(run.architecture)}
            write_weights(self.best, run.best, key=self.path.name, **about)

    def finish(self, record: Record) -> None:
        """The record is written last: where it is, everything is."""
        with replacing(self.path / "record.json") as new:
            new.write_text(json.dumps({"sha256": _digest(self.best), "record": schema.to_plain(record)}, allow_nan=False))
        Checkpoints(self.path).drop(POINT)

    def finished(self, lm: Model) -> tuple[Model, Record] | None:
        """The trained model and its record, if both are here and whole; what is not is reported.

        Raises SpecError where the weights are those of another model.
        """
        if (written := _read(self.path / "record.json")) is None:
            return None
        record, digest = written
        try:
            trained = load_weights(lm, self.best)
            if _digest(self.best) != digest:
                raise UnreadableError(f"{self.best} holds other weights than those that record.json beside it is about.")
        except UnreadableError as error:
            warn(f"{error} The model is trained anew.")
            return None
        return trained, record


def _read(file: Path) -> tuple[Record, str] | None:
    """A finished record and the digest of its weights."""
    try:
        written = json.loads(file.read_text())
        return schema.convert(written["record"], Record), written["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        warn(f"{file} is broken ({type(error).__name__}: {error}); the model is trained anew.")
        return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
