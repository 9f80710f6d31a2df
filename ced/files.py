"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ced.errors import BusyError


@contextmanager
def written_aside(path: Path, sync: bool = True) -> Iterator[Path]:
    """Give a path beside `path` to write to; what is there at the end takes its place at once.

    When writing fails, what was written is removed and `path` is as it was. `sync` waits until it is on disk,
    so that a power cut leaves the old file or the new one.
    """
    aside = path.with_name(f"{path.name}.partial")
    try:
        yield aside
        if sync:
            with aside.open("r+b") as written:
                os.fsync(written.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


class HeldWriter:
    """A file to write to that never raises: the first error is held, and what comes after it is dropped.

    It is for C libraries that crash, print tracebacks or lose the error when the file they write to raises one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file  # unbuffered
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes at the current place."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self.error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Give the file a size."""
        try:
            return self._file.truncate(size) if self.error is None else size or 0
        except OSError as error:
            self.error = error
            return size or 0

    def read(self, size: int = -1) -> bytes:
        """Read bytes from the current place."""
        return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        """Read bytes from the current place; zeros stand for what was dropped."""
        view = memoryview(buffer).cast("B")
        read = self._file.readinto(view)  # type: ignore[attr-defined]
        view[read:] = bytes(len(view) - read)
        return len(view)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the current place."""
        return self._file.tell()

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""


@contextmanager
def errors_held(path: Path) -> Iterator[HeldWriter]:
    """Open a file to write to, and raise the first error of it at the end, instead of whatever that error led to."""
    with open(path, "w+b", buffering=0) as file:
        held = HeldWriter(file)
        try:
            yield held
        finally:
            if held.error is not None:
                raise held.error


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path` as long as this one does; a kill lets go of it.

    Raises:
        BusyError: another process is writing it.
    """
    from filelock import FileLock, Timeout  # takes longer to import than most commands need it

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BusyError(f"another process is writing {path}; wait for it, or choose another place") from error
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
