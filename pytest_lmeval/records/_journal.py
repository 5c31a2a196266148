"""Write the journal: one JSON object a line, appended and synced as soon as a result is there.

After a killed run, the next one takes the finished results from its lines instead of computing them again. A run that ends by
itself writes a closing line; the results that it names are history and are not served again, so that the next run measures.

    {"event": "result", "key": ..., "record": {...}}
    {"event": "end", "keys": [...]}

A run that scores a share of the examples begins with {"event": "shard", "share": "3/8"}, and its results say of which call they
are a share (`Line`).

Unfinished work lies beside the journal, one file a key in `partial/` (see `Checkpoints`), and what was read for the questions
of tasks in `answers/` (see `scoring._answers`), which later runs use, too.
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

import msgspec

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._live import clear as clear_live
from pytest_lmeval.records._replacing import append, inside, leftovers, replacing
from pytest_lmeval.records._schema import StoredStruct
from pytest_lmeval.records._secrets import without_secrets

NAME, PARTIAL, ANSWERS, PARTS = "journal.jsonl", "partial", "answers", "parts"
MERGED = b'{"event": "merged"}'  # the first and last line of a journal of merged shards
KEPT = 14 * 24 * 3600.0  # seconds that unfinished work of a run that nobody resumes is kept


class Line(StoredStruct, frozen=True):
    """A line of the journal: a result, the end of a run with the keys that it used (None: all), or the share of a run.

    share  of the examples that a result is about, such as 3/8; empty: all
    whole  the key that the result of all examples has
    alone  no other share has a part of it
    part   file of what the shares are merged from, relative to the output folder
    """

    event: str
    key: str = ""
    record: dict[str, Any] = {}
    keys: list[str] | None = None
    share: str = ""
    whole: str = ""
    alone: bool = False
    part: str | None = None


_decode = msgspec.json.Decoder(Line).decode


def _line_of(text: bytes) -> Line:
    try:
        return _decode(text)
    except (msgspec.MsgspecError, ValueError):  # such as a surrogate that stands alone, which is valid here
        return schema.convert(schema.parse(text, "", ""), Line)


class JournalWarning(UserWarning):
    """Part of a journal or a checkpoint could not be read; the rest is used."""


def warn(message: str) -> None:
    """Warn even where warnings are errors: the problem is being repaired and must not fail a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", JournalWarning)
        warnings.warn(message, JournalWarning, stacklevel=3)


def replace_or_warn(file: Path, text: str) -> None:
    """Replace a file of examples. If that fails, warn, and delete what an earlier run wrote: it would pass for this run's."""
    try:
        with replacing(file) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        with suppress(OSError):
            file.unlink()
        warn(f"{file} cannot be written ({error.strerror or error}): the examples of this measurement are not kept.")


def key_of(**identity: Any) -> str:
    """Hash the identity of a piece of work: test, model fingerprint, data, settings."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Journal:
    """The journal of an output folder. Each line is appended in one write, so parallel workers can share it."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.path = folder / NAME
        self.fails = False
        self.checkpoints = Checkpoints(folder / PARTIAL)
        if fresh:
            self.end()
            self.checkpoints.drop_all()
            shutil.rmtree(folder / ANSWERS, ignore_errors=True)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record that an interrupted run finished under this key."""
        return self.results.get(key)

    def begin(self, share: str) -> None:
        """Begin a run that scores a share of the examples. Raises OSError."""
        self._append({"event": "shard", "share": share})

    def add(self, key: str, record: dict[str, Any], **of_share: str | bool | None) -> None:
        """Write a result; `of_share` are the fields of a `Line` that say which share it is about.

        If that fails, warn once: it is in this run's report, and only an interrupted run would need it."""
        try:
            self._append({"event": "result", "key": key, "record": without_secrets(record), **of_share})
            self.checkpoints.drop(key)
        except OSError as error:
            if not self.fails:
                why = error.strerror or error
                warn(f"{self.path} cannot be written ({why}); the run goes on. If it is interrupted, it measures this again.")
            self.fails = True

    def end(self, keys: Iterable[str] | None = None) -> None:
        """Close a run: the results that it used (None: all) become history. Those of other unfinished runs stay, and so do
        merged ones, which every run takes until all become history.

        Raises OSError."""
        if keys is not None and self._read().startswith(MERGED):
            self._append({"event": "merged"})
            return
        self._append({"event": "end", "keys": None if keys is None else sorted(keys)})

    def _append(self, line: dict[str, Any]) -> None:
        append(self.path, json.dumps(line, allow_nan=False).encode() + b"\n")

    def _read(self) -> bytes:
        """Its content; empty if there is none. Warns of one that cannot be read."""
        try:
            return inside(self.path.parent, self.path.name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            warn(f"{self.path} cannot be read ({error.strerror or error}), so nothing of an interrupted run is used.")
            return b""

    def unfinished(self) -> list[dict[str, Any]]:
        """The results of interrupted runs, if one was interrupted after the last run that ended; else none."""
        for text in reversed(self._read().splitlines()):
            with suppress(ValueError):
                if (event := schema.convert(schema.parse(text, "", ""), Line).event) in ("end", "result", "merged"):
                    return [*self.results.values()] if event == "result" else []
        return []

    def last_run(self) -> list[Line]:
        """The results of the last run, whether it ended or not, after the line that says its share, if there is one. A shard
        that has begun anew has none of a run that ended before it."""
        share, known, current, last = list[Line](), dict[str, Line](), dict[str, Line](), list[Line]()
        for text in self._read().splitlines():
            try:
                line = _line_of(text)
            except (ValueError, RecursionError):
                continue  # cut off when the run was killed
            if line.event == "shard":
                share, last = [line], []
            elif line.event == "result":
                known[line.key] = current[line.key] = line
            elif line.event == "end":
                last = [known[key] for key in (known if line.keys is None else line.keys) if key in known]
                current = {}
        return [*share, *(current.values() or last)]

    @functools.cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """Records of interrupted runs, as the journal held them at the first access."""
        results: dict[str, dict[str, Any]] = {}
        broken: list[str] = []
        for number, text in enumerate(self._read().splitlines(), start=1):
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


def clean(folder: Path) -> None:
    """Delete what killed runs left in an output folder, except what this or a parallel run may still use: files that no process
    is writing, and unfinished work and answers that have not changed for two weeks."""
    old = (file for name in (PARTIAL, ANSWERS) for file in leftovers(folder / name, unfinished=KEPT))
    for file in (*leftovers(folder), *old):
        with suppress(OSError):
            file.unlink()
    clear_live(folder)


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
            with open(inside(self.folder, f"{key}.pt"), "rb") as file:
                return load(file)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - a half-written or foreign file can make the reader raise anything
            why = f"{type(error).__name__}: {str(error)[:200]}"
            warn(f"the saved point {self._path(key)} cannot be read ({why}); the work starts again.")
            return None

    def drop(self, key: str) -> None:
        with suppress(OSError):
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
