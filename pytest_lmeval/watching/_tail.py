"""Read the lines that are added to a file of an output folder, once each, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pytest_lmeval.records._replacing import inside

LONGEST = 32 << 20  # bytes of a line; a longer one is skipped
COMPARED = 64  # bytes at the beginning, and before the offset, that tell a file from another that took its place


class Tail:
    """The lines of a file from an offset on. A file that was replaced or cut is read from its beginning.

    last       begin at most so many bytes before the end, with the first whole line; None: at the beginning
    replaced   called before the lines of a file that took the place of the one that was read, and if that is gone
    """

    def __init__(
        self, folder: Path, name: str, *, last: int | None = None, replaced: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.name, self.last, self.replaced = folder, name, last, replaced
        self._file: tuple[int, int] | None = None
        self._offset, self._beginning, self._before = 0, b"", b""

    def lines(self) -> Iterator[bytes]:
        """The whole lines that are new. A line without its end, which is still written, comes later.

        Raises OSError for what is no regular file of the folder."""
        try:
            path = inside(self.folder, self.name)
        except FileNotFoundError:
            self._forget()
            return
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if self._file != (status.st_dev, status.st_ino) or not self._goes_on(file, status.st_size):
                self._forget()
                file.seek(0)
                self._beginning = file.read(COMPARED)
                self._file = status.st_dev, status.st_ino
                if self.last is not None and status.st_size > self.last:
                    self._offset = status.st_size - self.last
                    self._take(_line(file, self._offset)[0])  # the rest of a line
            while self._offset < status.st_size:
                line, length = _line(file, self._offset)
                if not line.endswith(b"\n"):
                    return
                self._take(line, length)
                if length == len(line):
                    yield line

    def _goes_on(self, file: IO[bytes], size: int) -> bool:
        """Whether the file still begins as it did, and what was read last still stands before the offset."""
        file.seek(0)
        if size < self._offset or file.read(len(self._beginning)) != self._beginning:
            return False
        file.seek(self._offset - len(self._before))
        return file.read(len(self._before)) == self._before

    def _take(self, line: bytes, length: int | None = None) -> None:
        self._offset += len(line) if length is None else length
        self._before = line[-COMPARED:]

    def _forget(self) -> None:
        if self._file is not None:
            self._file, self._offset, self._beginning, self._before = None, 0, b"", b""
            self.replaced()


def _line(file: IO[bytes], offset: int) -> tuple[bytes, int]:
    """The line at an offset, and its length in bytes: more than there are here for a line that is too long, of which the last
    piece is returned."""
    file.seek(offset)
    line = file.readline(LONGEST)
    length = len(line)
    while len(line) == LONGEST and not line.endswith(b"\n"):
        line = file.readline(LONGEST)
        length += len(line)
    return line, length
