"""Read and write files of a folder that may come from anywhere, so that a killed run or a full disk damages none of them.

A folder of output may be a cache or an artefact of a stranger: a name in one of its files, or a link or pipe in it, leads
nowhere else (`inside`), and nothing is appended through a link (`append`).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows: only the age of a file tells whether it is still written
    flock = None  # type: ignore[assignment]

NEW = ".new"  # what the name of an unfinished file ends with
HOUR = 3600.0


def inside(folder: Path, name: str | Path) -> Path:
    """The regular file of that name in a folder, with links resolved.

    Raises OSError: FileNotFoundError if there is none, PermissionError for one that lies outside of the folder (by its name or
    by a link) or that is no regular file, such as a pipe that is never closed.
    """
    return regular(Path(folder, name), within=folder)


def regular(file: Path, *, within: Path | None = None) -> Path:
    """The regular file at this path, with links resolved. Raises OSError as `inside`."""
    try:
        found = file.resolve(strict=True)
    except NotADirectoryError as error:  # something stands in place of its folder
        raise FileNotFoundError(errno.ENOENT, error.strerror, str(file)) from None
    except (ValueError, RuntimeError) as error:  # a name with a null byte, a link to itself
        raise PermissionError(errno.EPERM, f"it is no name of a file: {error}", str(file)) from None
    if within is not None and not found.is_relative_to(within.resolve()):
        raise PermissionError(errno.EPERM, "it lies outside of the folder", str(file))
    if not found.is_file():
        raise PermissionError(errno.EPERM, "it is no regular file", str(file))
    return found


@contextmanager
def replacing(file: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a new file to write; it replaces `file` in one move if the block raises nothing: a reader sees the old content or
    the new one, whole; if `sync`, after a power cut too. The new file is locked, so that `leftovers` leaves it alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}{NEW}")
    new.unlink(missing_ok=True)  # of a killed process that had the same id, or a link
    lock = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        _is_locked(lock)
        yield new
        if sync:
            with open(new, "r+b") as written:
                os.fsync(written.fileno())
        os.replace(new, file)
    finally:
        os.close(lock)
        with suppress(OSError):
            new.unlink(missing_ok=True)


def append(file: Path, raw: bytes, *, sync: bool = True) -> None:
    """Append lines in one write, so that parallel workers can share a file, and force them to the disk if `sync`.

    A line that was cut off at the end of the file is ended first, so that it costs no later one. Raises OSError, also for a
    file that is no regular one.
    """
    with appending(file) as end:
        if end.tell():
            end.seek(-1, os.SEEK_END)
            raw = raw if end.read(1) == b"\n" else b"\n" + raw
        if (written := end.write(raw)) != len(raw):
            raise OSError(errno.ENOSPC, f"only {written} of {len(raw)} bytes were written", str(file))
        if sync:
            os.fsync(end.fileno())


def appending(file: Path, mode: str = "ab+") -> FileIO:
    """Open a file without a buffer, to write to it. Raises OSError for a link, a pipe or a device."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise PermissionError(errno.EPERM, "it is a link, or no regular file", str(file))
    return FileIO(file, mode)


def leftovers(folder: Path, *, unfinished: float | None = None) -> list[Path]:
    """The files that killed runs left in a folder: those that were about to replace others, and that no process is writing.

    unfinished  seconds; then all files that have not changed for so long
    """
    found = []
    for file in folder.rglob("*" if unfinished else f"*{NEW}"):
        with suppress(OSError):
            if file.is_file() and not file.is_symlink():
                age = time.time() - file.stat().st_mtime
                if (unfinished and age > unfinished) or (file.suffix == NEW and (age > HOUR or not _is_written(file))):
                    found.append(file)
    return found


def _is_written(file: Path) -> bool:
    """Whether a process holds the lock of a file, as far as can be told."""
    with open(file, "rb") as opened:
        return _is_locked(opened.fileno())


def _is_locked(descriptor: int) -> bool:
    """Lock a file; whether that failed: because another process has locked it, or since this system cannot."""
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except (OSError, TypeError):
        return True
    return False
