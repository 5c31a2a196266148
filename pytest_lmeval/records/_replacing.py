"""Replace files atomically: a reader sees the old content or the new one, whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a new file to write; it replaces `file` if the block raises nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        yield new
        with open(new, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
