"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
