"""Write and read the file of answers: a JSON object a line, appended after each block, so that a killed run loses none."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import replace_or_warn, warn
from pytest_lmeval.records._replacing import append, regular


class AnswerFile:
    """The answers so far, at `path`; None keeps none."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.fails = False

    def read(self) -> dict[int, Example]:
        """The answers of an interrupted run, by the number of their row. Warns of a line that was cut off, and skips it."""
        found: dict[int, Example] = {}
        try:
            lines = [] if self.path is None else regular(self.path).read_bytes().splitlines()
        except FileNotFoundError:
            return found
        except OSError as error:
            warn(f"{self.path} cannot be read ({error.strerror or error}); its questions are asked again.")
            return found
        for number, line in enumerate(lines, start=1):
            try:
                example = schema.convert(json.loads(line), Example)
                found[example.number] = example
            except ValueError as error:
                warn(f"{self.path}, line {number} is broken ({type(error).__name__}); that question is asked again.")
        return found

    def append(self, examples: Iterable[Example]) -> None:
        lines = "".join(schema.line_of(example) for example in examples)
        if self.path is None or self.fails or not lines:
            return
        try:
            append(self.path, lines.encode())
        except OSError as error:
            self.fails = True
            why = error.strerror or error
            warn(f"{self.path} cannot be written ({why}); the questions are asked on. If interrupted, they are asked again.")

    def finish(self, examples: Iterable[Example], final: str | Path | None) -> None:
        """Write all answers, in the order of their questions, to `final` in one move."""
        if final is not None:
            replace_or_warn(Path(final), "".join(schema.line_of(example) for example in examples))
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()
