"""What the tests of one run share: the output folder, the journal, the verdicts that were already reached.

One of these lives in each process (under xdist, in each worker). Records travel to the process that writes the
reports on the test reports, as JSON, like everything that pytest sends between processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pytest_lmeval.lm import Model, fingerprint
from pytest_lmeval.results.journal import Journal
from pytest_lmeval.results.record import Record

ProgressBars = Callable[[str], AbstractContextManager[Any]]


@dataclass
class Session:
    """folder    where everything is written
    progress  makes the progress bar of a long piece of work, given its title: a context around a callback or None
    tokens, limit, seq_len    defaults of the verbs, from the command line
    """

    folder: Path
    tokens: int | None = None
    limit: int | None = None
    seq_len: int | None = None
    progress: ProgressBars = lambda title: nullcontext(None)
    verdicts: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def journal(self) -> Journal:
        return Journal(self.folder)

    def verdict(self, lm: Model) -> Any:
        """The equivalence result of a model: probed once in a session."""
        from pytest_lmeval.equivalence.probe import equivalence

        key = f"{fingerprint(lm)} {lm.dtype} {lm.device}"
        if key not in self.verdicts:
            self.verdicts[key] = equivalence(lm)
        return self.verdicts[key]


@dataclass
class TestLog:
    """What one test has recorded so far, and what the reader should be told beside it."""

    test: str
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # of the journal's lines that this test wrote or was served from

    def to_json(self) -> dict[str, Any]:
        return {"records": [record.to_json() for record in self.records], "notes": self.notes, "keys": self.keys}


def check_writable(folder: Path) -> None:
    """Raise OSError now, before the work, if nothing could be written to `folder` after it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe: IO[bytes]
    with open(folder / ".writable", "wb") as probe:
        probe.write(b"yes")
    (folder / ".writable").unlink()
