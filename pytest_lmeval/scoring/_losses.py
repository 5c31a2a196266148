"""The loss of every target in a .npy file, appended as they come; never held, and never longer than what was scored."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np


class LossFile:
    """Appends float32 losses to a .npy file. Its header is padded for growth, and written again at the end.

    already  losses that the file holds from an interrupted reading: what stands behind them is cut off
    """

    def __init__(self, path: str | Path | None, *, already: int = 0) -> None:
        self.path, self.count = path, already

    @staticmethod
    def holds(path: str | Path | None, count: int) -> bool:
        """Whether the file at `path` has the first `count` losses (of none, if there is to be no file)."""
        if path is None:
            return True
        return Path(path).exists() and Path(path).stat().st_size >= _header_size() + 4 * count

    def __enter__(self) -> LossFile:
        if self.path is not None:
            self.file = open(self.path, "r+b" if self.count else "w+b")
            self._write_header()
            self.file.truncate(_header_size() + 4 * self.count)
            self.file.seek(0, os.SEEK_END)
        return self

    def write(self, nll: np.ndarray | None) -> None:
        if self.path is not None and nll is not None:
            self.file.write(nll.astype("<f4").tobytes())
            self.count += len(nll)

    def sync(self) -> None:
        """What was written is on the disk."""
        if self.path is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.path is not None:
            self._write_header()
            self.file.close()

    def _write_header(self) -> None:
        self.file.seek(0)
        self.file.write(_header(self.count))


def _header(count: int) -> bytes:
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    return buffer.getvalue()


def _header_size() -> int:
    return len(_header(0))
