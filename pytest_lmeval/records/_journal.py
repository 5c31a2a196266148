"""The journal: one JSON object a line, appended and synced as each result is there.

A run that is killed leaves every finished line behind, and the next run takes its results from there instead of
computing them again. A run that ends by itself writes a closing line; the results that it names are history and are
never served again, since the next run is meant to measure anew.

    {"event": "result", "key": ..., "record": {...}}
    {"event": "end", "keys": [...]}

Work that was in the middle is kept beside the journal, one file a key in `partial/` (see `Checkpoints`).
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

from pytest_lmeval.records._replacing import replacing


class JournalWarning(UserWarning):
    """A journal or a checkpoint that could not be read whole; what could be read is used."""


def warn(message: str) -> None:
    """Always a warning, also where warnings are errors: what it tells of is being mended, and must not fail a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", JournalWarning)
        warnings.warn(message, JournalWarning, stacklevel=3)


def key_of(**identity: Any) -> str:
    """The identity of a piece of work: test, model fingerprint, data, settings."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Journal:
    """The journal of an output folder. Lines are appended whole, so that parallel workers can share it."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.path = folder / "journal.jsonl"
        self.checkpoints = Checkpoints(folder / "partial")
        if fresh:
            self.end()
            self.checkpoints.drop_all()

    def get(self, key: str) -> dict[str, Any] | None:
        """The record that an interrupted run had already finished under this key."""
        return self.results.get(key)

    def add(self, key: str, record: dict[str, Any]) -> None:
        self._append({"event": "result", "key": key, "record": record})
        self.checkpoints.drop(key)

    def end(self, keys: Iterable[str] | None = None) -> None:
        """Close a run: the results that it used (None: all) are history. What other runs left unfinished stays."""
        self._append({"event": "end", "keys": None if keys is None else sorted(keys)})

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            torn = file.tell() > 0 and not _ends_with_newline(self.path)
            file.write(b"\n" * torn + json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @functools.cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """Records of interrupted runs, as they stood when the journal was first asked."""
        results: dict[str, dict[str, Any]] = {}
        broken: list[str] = []
        if not self.path.exists():
            return results
        for number, raw in enumerate(self.path.read_bytes().splitlines(), start=1):
            try:
                line = json.loads(raw)
                if line["event"] == "end":
                    ended = line["keys"]
                    results = {} if ended is None else {key: results[key] for key in results if key not in ended}
                    broken = []  # told by the run that ended here
                elif line["event"] == "result":
                    results[line["key"]] = line["record"]
            except (ValueError, KeyError, TypeError):
                if raw.strip():
                    broken.append(f"{self.path}, line {number} is broken and was dropped ({raw[:60]!r}...)")
        for what in broken:
            warn(f"{what}: the run that wrote it was probably killed there. That result is computed again.")
        return results


def check_writable(folder: Path) -> None:
    """Raise OSError now, before the work, if nothing could be written to `folder` after it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"yes")


class Checkpoints:
    """Saved points of long work, one file a key, replaced in one move so that there is always a whole one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, key: str, save: Callable[[IO[bytes]], None]) -> None:
        """Save a point. Raises OSError where that fails."""
        try:
            with replacing(self._path(key)) as new, open(new, "wb") as file:
                save(file)
        except RuntimeError as error:
            if error.__context__ is not None and error.__cause__ is None:
                raise error.__context__ from None  # torch.save trips over its half-written file, and speaks of that
            raise

    def read(self, key: str, load: Callable[[IO[bytes]], Any]) -> Any:
        """What was saved under this key, or None. A file that cannot be read is reported and not used."""
        try:
            with open(self._path(key), "rb") as file:
                return load(file)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - whatever a half-written or foreign file makes of the reader
            warn(
                f"the saved point {self._path(key)} cannot be read ({type(error).__name__}: {str(error)[:200]}); "
                "the work begins anew."
            )
            return None

    def drop(self, key: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(key))

    def drop_all(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"


class Saver:
    """Saves a point to go on from every two seconds, or less often where that would take more than one percent of the time.

    save  (point) writes it; None: nothing is saved
    what  the work is called
    """

    PAUSE, SHARE = 2.0, 100.0

    def __init__(self, save: Callable[[Any], None] | None, what: str) -> None:
        self.save, self.what = save, what
        self.next = time.perf_counter() + self.PAUSE

    def save_now_and_then(self, point: Any) -> None:
        """Save `point` if it is time. What cannot be saved is reported, and not tried again: the work goes on."""
        if self.save is None or time.perf_counter() < self.next:
            return
        began = time.perf_counter()
        try:
            self.save(point)
        except OSError as error:
            self.save = None
            warn(
                f"no point to go on from can be saved ({error}); the {self.what} itself goes on. If it is interrupted, it "
                "begins anew."
            )
        self.next = time.perf_counter() + max(self.PAUSE, self.SHARE * (time.perf_counter() - began))


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
