"""Say why lm_eval could not make a task: its data could not be had, or something in its files fails."""

from __future__ import annotations

import contextlib
import logging
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from pytest_lmeval.errors import described


class LoggedErrors(logging.Handler):
    """The errors that lm_eval logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        logger = logging.getLogger("lm_eval")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)


def why(error: BaseException, said: Sequence[str]) -> str:
    """Why a task could not be made, and what to do: its data could not be had, or something in its files fails."""
    frames = traceback.extract_tb(error.__traceback__)
    words = "; ".join([described(error), *said])
    if any(frame.name == "load_dataset" for frame in frames):
        return (
            f"{words}). It is lm_eval's, and reads its data with `datasets.load_dataset`: without a network, point "
            "--lmeval-data at a mirror, or name a YAML file that includes it and has a dataset_path of your own."
        )
    beyond = frames[next((index for index, frame in enumerate(frames) if "lm_eval" in Path(frame.filename).parts), 0) :]
    own = [frame for frame in beyond if not _installed(frame.filename)]
    at = f" at {own[-1].filename}, line {own[-1].lineno}" if own else ""
    return (
        f"{words}{at}). lm_eval made it of its files: a template is tried on the first row, and functions, filters and metrics "
        "are looked up. Mend what the message names."
    )


def _installed(file: str) -> bool:
    """Whether a file is one of Python's, of a package, or none: what is left is the task's."""
    return file.startswith(("<", sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parents[1])))
