"""Say what an output folder holds of a run at the moment, as plain values for the page. Writes nothing."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.records import _live as live, _schema as schema
from pytest_lmeval.records._document import NAME as METRICS, load
from pytest_lmeval.records._journal import ANSWERS, NAME as JOURNAL
from pytest_lmeval.records._live import QUIET, Live
from pytest_lmeval.records._replacing import inside
from pytest_lmeval.report._overview import overview
from pytest_lmeval.report._words import number, one_line, several, visible
from pytest_lmeval.watching._answers import Answers
from pytest_lmeval.watching._results import SHOWN, Results

FRESH = 0.5  # seconds for which what was read is served to other pages, too
PROCESSES, SMALL = 256, 1 << 16  # files of running processes, and bytes of one
POINTS = 600  # of the curve of the running perplexity
FAILED = 20  # failed tests of the last run that are named


class Folder:
    """An output folder that is read again and again; of files that grow, only what is new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results, self._answers = Results(path), Answers(path)
        self._curves: dict[tuple[str, str], deque[tuple[int, float]]] = {}
        self._report: tuple[tuple[int, int], dict[str, Any]] | None = None
        self._lock, self._read_at, self._state = threading.Lock(), -math.inf, dict[str, Any]()

    @property
    def has_run(self) -> bool:
        """Whether a run has written something here."""
        return any((self.path / name).exists() for name in (JOURNAL, METRICS, ANSWERS)) or bool(live.files(self.path))

    def state(self) -> dict[str, Any]:
        """What the folder holds now."""
        with self._lock:
            if time.monotonic() - self._read_at >= FRESH:
                self._state, self._read_at = self._read(), time.monotonic()
            return self._state

    def _read(self) -> dict[str, Any]:
        problems: list[str] = []
        _try(problems, JOURNAL, self._results.read)
        answers = _try(problems, ANSWERS, self._answers.read) or []
        works = [found for file in live.files(self.path)[:PROCESSES] if (found := _try(problems, file.name, self._work(file)))]
        self._curves = {key: curve for key, curve in self._curves.items() if any(one["process"] == key[0] for one in works)}
        report = _try(problems, METRICS, self._finished)
        results = self._results
        if results.broken:
            problems.append(
                f"{several(results.broken, 'line')} of {JOURNAL} cannot be read: a killed run was writing there, or another "
                "version of this package wrote it"
            )
        if not self.path.is_dir():
            problems.append(f"the folder {self.path} is gone")
        rate = self._answers.tokens_per_second
        return {
            "folder": str(self.path),
            "status": self._status(works, report),
            "works": works,
            "results": results.shown[-SHOWN:],
            "count": len(results.shown),
            "share": results.share,
            "answers": answers,
            "answer_rate": None if rate is None else number(rate, "tokens/s"),
            "report": report,
            "problems": list(map(one_line, problems)),
        }

    def _status(self, works: list[dict[str, Any]], report: dict[str, Any] | None) -> str:
        """The state of the run in words."""
        heard = [work for work in works if work["age"] < QUIET]
        if heard:
            return "The run goes on" if len(heard) == 1 else f"The run goes on in {len(heard)} processes"
        if works:
            return f"No news for {min(work['age'] for work in works):.0f} seconds: the run was killed, or a long step goes on"
        if self._results.open:
            return "Nothing is measured at the moment: the run is between two measurements, or it was killed"
        if self._results.ended is not None or report is not None:
            return "The run ended"
        return "There is no run here yet"

    def _work(self, file: Path) -> Callable[[], dict[str, Any] | None]:
        """A function that reads what a process does; None for a file that is gone."""

        def read() -> dict[str, Any] | None:
            with open(inside(self.path, file.name), "rb") as opened:
                raw = opened.read(SMALL)
            own = schema.convert(schema.parse(raw, file.name, "The run writes it again."), Live)
            return self._described(own, live.process_of(file))

        return read

    def _described(self, own: Live, process: str) -> dict[str, Any]:
        """What a process does, as texts; with the curve of its running perplexity."""
        unit, total = "tokens" if own.unit == "laws" else own.unit, math.nan if own.total is None else own.total
        passed, left = own.written - own.started, None
        rate = (own.done - own.first) / passed if own.started and passed > 0 and own.done > own.first else None
        if rate and own.expected is not None:
            left = max(0.0, (own.expected - own.done) / rate - (time.time() - own.written))
        curve = self._curves.setdefault((process, own.title), deque(maxlen=POINTS))
        if own.unit == "tokens" and own.done > 0 and own.total is not None and (not curve or curve[-1][0] != own.done):
            if curve and curve[-1][0] > own.done:
                curve.clear()  # it was begun again
            curve.append((own.done, math.exp(min(own.total / own.done, 700))))
        return {
            "process": process,
            "test": visible(own.test),
            "title": visible(own.title),
            "done": f"{own.done:,}" + ("" if own.expected is None else f" of {own.expected:,}") + f" {visible(unit)}",
            "share": min(1.0, max(0.0, own.done / own.expected)) if own.expected else None,
            "so_far": live.so_far(own.unit, own.done, total),
            "rate": None if rate is None else number(rate, f"{visible(unit)}/s"),
            "left": None if left is None else round(left),
            "age": max(0.0, time.time() - own.written),
            "curve": [[done, perplexity] for done, perplexity in curve],
        }

    def _finished(self) -> dict[str, Any] | None:
        """The headline of the last run that ended; None if there is none."""
        status = inside(self.path, METRICS).stat()
        version = status.st_mtime_ns, status.st_size
        if self._report is None or self._report[0] != version:
            document = load(self.path)
            found = overview(document)
            self._report = (
                version,
                {
                    "headline": visible(found.headline),
                    "judged": visible(found.judged),
                    "outcome": found.outcome,
                    "started": visible(document.run.started),
                    "failed": [[visible(test), visible(message)] for test, message, _ in found.failed[:FAILED]],
                },
            )
        return self._report[1]


def _try(problems: list[str], name: str, read: Callable[[], Any]) -> Any:
    """What `read` returns. If it cannot, says why among the problems: the rest of the folder is shown."""
    try:
        return read()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, DocumentError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        problems.append(f"{name} cannot be read ({why})")
        return None
