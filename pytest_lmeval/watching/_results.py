"""Follow the journal of a run: the results that are there, as rows of texts, and whether the run ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import NAME, Line
from pytest_lmeval.records._measured import Record
from pytest_lmeval.report._tables import groups
from pytest_lmeval.report._words import visible
from pytest_lmeval.watching._tail import Tail

SHOWN = 200  # results on the page: the last ones
KEPT = 5_000  # results in memory


class Results:
    """The results that the journal of a folder holds of the run that goes on, or of the last one that ended."""

    def __init__(self, folder: Path) -> None:
        self._tail = Tail(folder, NAME, replaced=self._begin_anew)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.open: dict[str, dict[str, Any]] = {}  # of runs that have not ended
        self.ended: list[dict[str, Any]] | None = None  # of the last one that did; None: there is none
        self.share = ""
        self.broken = 0

    def read(self) -> None:
        """Read the lines that are new. Raises OSError for a journal that is no regular file of the folder."""
        for text in self._tail.lines():
            try:
                self._add(schema.convert(schema.parse(text, "", ""), Line))
            except ValueError:
                self.broken += bool(text.strip())

    def _add(self, line: Line) -> None:
        if line.event == "result":
            self.open.pop(line.key, None)  # the last one is the latest
            self.open[line.key] = summary(schema.convert(line.record, Record))
            if len(self.open) > KEPT:
                del self.open[next(iter(self.open))]
        elif line.event == "shard":
            self.share = line.share
        elif line.event == "end":
            keys = set(self.open if line.keys is None else line.keys)
            self.ended = [result for key, result in self.open.items() if key in keys]
            self.open = {key: result for key, result in self.open.items() if key not in keys}

    @property
    def shown(self) -> list[dict[str, Any]]:
        return [*self.open.values()] or self.ended or []


def summary(record: Record) -> dict[str, Any]:
    """A result as the page shows it: its name, and its numbers as texts."""
    (group,) = groups([record])
    names = {"kind": record.kind, "model": record.lm.spec, "subject": record.subject, "test": record.test}
    rows = [[row.metric, row.value, row.interval, row.n] for row in group.rows]
    return {name: visible(text) for name, text in names.items()} | {"numbers": [list(map(visible, row)) for row in rows]}
