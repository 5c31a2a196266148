"""The file of answers: one JSON object a line, appended as each block is answered, so that a killed run loses none of them."""

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
    """Answers so far, at `path`; None keeps none."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)

    def read(self) -> dict[int, Example]:
        """The answers of an interrupted run, by the number of their row. A line that was cut off is dropped, and said."""
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
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = lines if file.read(1) == b"\n" else "\n" + lines  # after one that was cut off
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self, examples: Iterable[Example], final: str | Path | None) -> None:
        """All answers in the order of their questions at `final`, in one move."""
        if final is not None:
            with replacing(Path(final)) as new:
                new.write_text("".join(schema.line_of(example) for example in examples), encoding="utf-8")
        if self.path is not None:
            self.path.unlink(missing_ok=True)
