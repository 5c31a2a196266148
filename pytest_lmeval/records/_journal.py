"""Write the journal: one JSON object a line, appended and synced as soon as a result is there.

After a killed run, the next one takes the finished results from its lines instead of computing them again. A run that ends by
itself writes a closing line; the results that it names are history and are not served again, so that the next run measures.

    {"event": "result", "key": ..., "record": {...}}
    {"event": "end", "keys": [...]}

Unfinished work lies beside the journal, one file a key in `partial/` (see `Checkpoints`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.records._schema import StoredStruct


class Line(StoredStruct, frozen=True):
    """A line of the journal: a result, or the end of a run with the keys that it used (None: all)."""

    event: str
    key: str = ""
    record: dict[str, Any] = {}
    keys: list[str] | None = None


class JournalWarning(UserWarning):
    """Part of a journal or a checkpoint could not be read; the rest is used."""


def warn(message: str) -> None:
    """Warn even where warnings are errors: the problem is being repaired and must not fail a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", JournalWarning)
        warnings.warn(message, JournalWarning, stacklevel=3)


def key_of(**identity: Any) -> str:
    """Hash the identity of a piece of work: test, model fingerprint, data, settings."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Journal:
    """The journal of an output folder. Each line is appended in one write, so parallel workers can share it."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.path = folder / "journal.jsonl"
        self.checkpoints = Checkpoints(folder / "partial")
        if fresh:
            self.end()
            self.checkpoints.drop_all()

    def get(self, key: str) -> dict[str, Any] | None:
        """The record that an interrupted run finished under this key."""
        return self.results.get(key)

    def add(self, key: str, record: dict[str, Any]) -> None:
        self._append({"event": "result", "key": key, "record": record})
        self.checkpoints.drop(key)

    def end(self, keys: Iterable[str] | None = None) -> None:
        """Close a run: the results that it used (None: all) become history. Those of other unfinished runs stay."""
        self._append({"event": "end", "keys": None if keys is None else sorted(keys)})

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @functools.cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """Records of interrupted runs, as the journal held them at the first access."""
        results: dict[str, dict[str, Any]] = {}
        broken: list[str] = []
        raw = self.path.read_bytes() if self.path.exists() else b""
        for number, text in enumerate(raw.splitlines(), start=1):
            try:
                line = schema.convert(schema.parse(text, "", ""), Line)
                if line.event == "end":
                    ended = results if line.keys is None else set(line.keys)
                    results = {key: record for key, record in results.items() if key not in ended}
                    broken = []  # the run that ended here has warned of them
                elif line.event == "result":
                    results[line.key] = line.record
            except ValueError:
                if text.strip():
                    broken.append(f"{self.path}, line {number} is broken and was dropped ({text[:60]!r}...)")
        for what in broken:
            warn(f"{what}: the run that wrote it was probably killed there. That result is computed again.")
        return results


def check_writable(folder: Path) -> None:
    """Raise OSError before the work if nothing could be written to `folder` after it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"yes")


class Checkpoints:
    """Saved progress of long work: one file a key, replaced atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, key: str, save: Callable[[IO[bytes]], None]) -> None:
        """Save a checkpoint. Raises OSError if that fails."""
        try:
            with replacing(self._path(key)) as new, open(new, "wb") as file:
                save(file)
        except RuntimeError as error:
            if error.__context__ is not None and error.__cause__ is None:
                raise error.__context__ from None  # torch.save hides the first error behind one about its half-written file
            raise

    def read(self, key: str, load: Callable[[IO[bytes]], Any]) -> Any:
        """What `load` reads from the checkpoint of this key, or None. Warns of a file that cannot be read."""
        try:
            with open(self._path(key), "rb") as file:
                return load(file)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - a half-written or foreign file can make the reader raise anything
            why = f"{type(error).__name__}: {str(error)[:200]}"
            warn(f"the saved point {self._path(key)} cannot be read ({why}); the work starts again.")
            return None

    def drop(self, key: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(key))

    def drop_all(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"


class Saver:
    """Saves a resume point every two seconds, or less often if that would take more than one percent of the time.

    save  writes a point; None: nothing is saved
    what  name of the work in warnings
    """

    PAUSE, SHARE = 2.0, 100.0  # least seconds between two points; and that as a multiple of the seconds that saving takes

    def __init__(self, save: Callable[[Any], None] | None, what: str) -> None:
        self.save, self.what = save, what
        self.next = time.perf_counter() + self.PAUSE

    def save_if_due(self, point: Any) -> None:
        """Save `point` if it is due. If that fails, warn and save no more: the work goes on."""
        if self.save is None or time.perf_counter() < self.next:
            return
        began = time.perf_counter()
        try:
            self.save(point)
        except OSError as error:
            self.save = None
            warn(f"no checkpoint can be saved ({error}); the {self.what} continues. If interrupted, it starts again.")
        self.next = time.perf_counter() + max(self.PAUSE, self.SHARE * (time.perf_counter() - began))
