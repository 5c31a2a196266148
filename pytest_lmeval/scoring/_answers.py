"""Write and read the file of answers: a JSON object a line, appended after each block, so that a killed run loses none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import warn
from pytest_lmeval.records._replacing import replacing


class AnswerFile:
    """The answers so far, at `path`; None keeps none."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)

    def read(self) -> dict[int, Example]:
        """The answers of an interrupted run, by the number of their row. Warns of a line that was cut off, and skips it."""
        found: dict[int, Example] = {}
        if self.path is None or not self.path.exists():
            return found
        for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
            try:
                example = schema.convert(json.loads(line), Example)
                found[example.number] = example
            except ValueError as error:
                warn(f"{self.path}, line {number} is broken ({type(error).__name__}); that question is asked again.")
        return found

    def append(self, examples: Iterable[Example]) -> None:
        lines = "".join(schema.line_of(example) for example in examples)
        if self.path is None or not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = lines if file.read(1) == b"\n" else "\n" + lines  # after a line that was cut off
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self, examples: Iterable[Example], final: str | Path | None) -> None:
        """Write all answers, in the order of their questions, to `final` in one move."""
        if final is not None:
            with replacing(Path(final)) as new:
                new.write_text("".join(schema.line_of(example) for example in examples), encoding="utf-8")
        if self.path is not None:
            self.path.unlink(missing_ok=True)
