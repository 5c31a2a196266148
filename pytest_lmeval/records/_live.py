"""Write what a run does at the moment into small files of its output folder, which `lmeval watch` reads.

`live.json` is that of the only process, or of the first rank; each worker of pytest-xdist has its own, such as `live-gw0.json`.
A file is replaced at most once a second, and deleted when its process ends by itself.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec.structs import replace

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.records._schema import StoredStruct
from pytest_lmeval.records._secrets import masked

NAME = re.compile(r"live(?:-(\w+))?\.json")
QUIET = 60.0  # seconds without a change after which a file may be that of a killed run


class Live(StoredStruct, frozen=True, kw_only=True):
    """What a process of a run does. Times are in seconds since 1970.

    test      node id of the test
    title     of the work that is going on; empty between two works
    unit      of `done`: tokens, questions, texts; for "laws", tokens
    done      so far, with what an interrupted run did
    first     what `done` was at the time `started`
    total     nats so far, right answers, or broken laws; None if there is no such sum
    expected  what `done` will be at the end; None if that is not known
    written   when this was written
    """

    test: str = ""
    title: str = ""
    unit: str = ""
    done: int = 0
    first: int = 0
    total: float | None = None
    expected: int | None = None
    started: float = 0.0
    written: float = 0.0


class LiveFile:
    """The file of one process. It is written at most once a second, and less often if that took more than 0.1 % of the time. If
    it cannot be written, the run goes on without."""

    PAUSE, SHARE = 1.0, 2000.0  # least seconds between two writes; and that as a multiple of the seconds that one takes

    def __init__(self, folder: Path, worker: str = "") -> None:
        self.path: Path | None = folder / (f"live-{worker}.json" if worker else "live.json")
        self._now, self._next, self._begun = Live(), 0.0, False

    @contextmanager
    def work(self, title: str, unit: str = "tokens") -> Iterator[Callable[[int, float, int | None], None]]:
        """While it lasts, that work is going on. Yields the callback of its progress."""
        outer, own = self._now, Live(test=_test(), title=masked(title), unit=unit)
        self._now, shown = own, self._write_if_due()

        def update(done: int, total: float, expected: int | None) -> None:
            nonlocal shown
            if not self._now.started:  # the rate leaves out what an interrupted run did before
                self._now = replace(self._now, first=done, started=time.time())
            if time.perf_counter() < self._next:
                return
            known = float(total) if math.isfinite(total) else None
            self._now = replace(self._now, done=int(done), total=known, expected=expected)
            shown = self._write_if_due() or shown

        try:
            yield update
        finally:
            self._now = outer
            if shown:
                self._write()

    def close(self) -> None:
        """Delete the file: this process does nothing more."""
        path, self.path = self.path, None
        if path is not None and self._begun:
            with suppress(OSError):
                path.unlink()

    def _write_if_due(self) -> bool:
        due = time.perf_counter() >= self._next
        if due:
            self._write()
        return due

    def _write(self) -> None:
        if self.path is None:
            return
        began = time.perf_counter()
        try:
            if not self._begun:
                clear(self.path.parent, unless_younger=QUIET)
            with replacing(self.path, sync=False) as new:
                new.write_text(schema.line_of(replace(self._now, written=time.time())), encoding="utf-8")
            self._begun = True
        except OSError:
            self.path = None
        self._next = time.perf_counter() + max(self.PAUSE, self.SHARE * (time.perf_counter() - began))


def _test() -> str:
    """The test that runs, as pytest names it in the environment; empty outside of one."""
    return masked(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0])


def files(folder: Path) -> list[Path]:
    """The files of all processes."""
    return sorted(file for file in folder.glob("live*.json") if NAME.fullmatch(file.name))


def process_of(file: Path) -> str:
    """The name of the worker whose file it is; empty if it is the only process, or the first."""
    found = NAME.fullmatch(file.name)
    return (found[1] or "") if found else ""


def clear(folder: Path, *, unless_younger: float = 0.0) -> None:
    """Delete the files, those of killed runs among them; a process that still runs writes its own again.

    unless_younger  leave those that changed in the last so many seconds
    """
    for file in files(folder):
        with suppress(OSError):
            if time.time() - file.lstat().st_mtime >= unless_younger:
                file.unlink()


def so_far(unit: str, done: float, total: float) -> str:
    """What the sum of a work says: perplexity, share of right answers, or broken laws; empty if it says nothing yet.

    >>> so_far("tokens", 100, 69.315), so_far("questions", 4, 3), so_far("laws", 9, 0), so_far("texts", 3, float("nan"))
    ('perplexity 2', '75.0% right', 'none broken', '')
    """
    if unit == "laws":
        return f"{total:.0f} broken" if total else "none broken"
    if math.isnan(total) or not done:
        return ""
    return f"perplexity {math.exp(min(total / done, 700)):.4g}" if unit == "tokens" else f"{total / done:.1%} right"
