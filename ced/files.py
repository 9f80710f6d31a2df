"""Safe writing: files are replaced atomically, never written through links, and claimed by one process at a time."""

import errno
import hashlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ced.errors import BusyError, CedError, WriteError

logger = logging.getLogger(__name__)

_LONGEST_NAME, _LONGEST_STEM = 255, 200  # bytes that file systems allow; bytes of a name that temporary files keep
_STALE = 86_400.0  # seconds without a change, after which a temporary file is taken for one of a killed process
_LEFTOVER = re.compile(r"\.[0-9a-f]{8}\.partial$")  # the end of the names of temporary files
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # error numbers of a full disk or a used-up quota
_LINKS = {errno.ELOOP, errno.EMLINK}  # errors of opening a link with O_NOFOLLOW; FreeBSD's is EMLINK
_FULL_WORDS = re.compile(r"no space left|errno = 28\b|os error 28\b|disk quota exceeded", re.I)  # of HDF5, Rust, C++
_swept: set[Path] = set()  # folders that this process has searched for stale files
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def written_aside(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary file beside `path` to write to; at the end it replaces `path` atomically.

    The temporary file is new and has a random name, so that no link placed in the folder beforehand is written through.
    When writing fails, it is removed and `path` is unchanged. That of a killed process is removed by
    `remove_leftovers`, or a day later by the next process that writes into the folder. A link at `path` is replaced,
    not followed.

    Args:
        path: the file to write.
        sync: wait until it is on disk, so that after a power cut either the old file or the new one is there.

    Raises:
        WriteError: the disk is full, the folder cannot be written to, or `path` is a folder or a device.
    """
    with writing(path):
        _check_replaceable(path)
        _remove_stale(path.parent)
        aside = _temporary(path)
        try:
            yield aside
            with _opened(aside, os.O_RDWR) as written:  # still a regular file, not a link
                if sync:
                    os.fsync(written.fileno())
            aside.replace(path)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk or a read-only folder into an error that names `path`.

    Raises:
        WriteError: writing `path` failed.
    """
    try:
        yield
    except CedError:
        raise
    except OSError as error:
        unnamed = error.filename is None and not isinstance(error, ConnectionError | TimeoutError)
        if error.errno in FULL or unnamed or _is_beside(error.filename, path):
            raise WriteError(path, _reason(error)) from error
        raise
    except Exception as error:  # C++ and Rust libraries raise errors of their own
        if _FULL_WORDS.search(str(error)) or _is_full(path):
            raise WriteError(path, os.strerror(errno.ENOSPC)) from error
        raise


def _is_beside(name: object, path: Path) -> bool:
    """Return whether an error is about `path`, its temporary file or its folder."""
    if not isinstance(name, str | bytes):
        return False
    place, folder = os.path.abspath(os.fsdecode(name)), os.path.abspath(path.parent)
    return folder in (place, os.path.dirname(place))


def _is_full(path: Path) -> bool:
    """Return whether the file system of `path` has no free block."""
    if not hasattr(os, "statvfs"):
        return False
    try:
        return os.statvfs(path.parent).f_bavail == 0
    except OSError:
        return False


def _reason(error: OSError) -> str:
    """Return the reason in a few words; the messages of HDF5 and Arrow are long."""
    if error.errno in _LINKS:
        return "it is a link"
    if error.errno is not None and error.errno in FULL:
        return os.strerror(error.errno)
    if _FULL_WORDS.search(str(error)):
        return os.strerror(errno.ENOSPC)
    return " ".join((error.strerror or str(error)).split()) or type(error).__name__


def _check_replaceable(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise WriteError(path, "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")


def _temporary(path: Path) -> Path:
    """Create an empty file with a new name in the folder of `path`."""
    while True:
        aside = path.with_name(f"{_stem(path)}.{secrets.token_hex(4)}.partial")
        with suppress(FileExistsError):
            os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_FOLLOW, 0o666))
            return aside


def name_with(name: str, suffix: str) -> str:
    """Return a name with a suffix appended; one too long for file systems is shortened, and ends with its digest."""
    whole = name + suffix
    if len(os.fsencode(whole)) <= _LONGEST_NAME:
        return whole
    end = f"~{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}{suffix}"
    return cut_name(name, _LONGEST_NAME - len(os.fsencode(end))) + end


def cut_name(text: str, size: int) -> str:
    """Shorten a name to at most `size` bytes in a file system."""
    text = text[: max(size, 0)]
    while len(os.fsencode(text)) > size:
        text = text[:-1]
    return text


def _stem(path: Path) -> str:
    """Return the name of `path`, shortened if that of its temporary file would be too long for a file system."""
    return cut_name(path.name, _LONGEST_STEM)


def _remove_stale(folder: Path) -> None:
    """Remove old temporary files of killed processes from a folder; once per process, as folders may be large."""
    if folder in _swept:
        return
    _swept.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _LEFTOVER.search(entry.name):
                with suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE:
                        os.unlink(entry.path)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed processes, of the file `path` or, if it is a folder, of all files below it.

    No other process may be writing these files, which `claimed` ensures. Links are not followed.
    """
    stem = None if path.is_dir() else _stem(path)
    for place, folders, names in os.walk(path if stem is None else path.parent):
        for name in names:
            if (found := _LEFTOVER.search(name)) and stem in (None, name[: found.start()]):
                with suppress(OSError):
                    os.unlink(os.path.join(place, name))
        if stem is not None:
            folders.clear()


def make_folders(root: Path, relative: Path) -> Path:
    """Create the folder `relative` below `root`, and missing parts of `root` itself.

    The path of `root` may contain links; that below it may not, so that all outputs stay below `root`.

    Raises:
        WriteError: `relative` is absolute, or a part of it is a link, is "..", or cannot be created.
    """
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    if relative.anchor:
        raise WriteError(relative, f"it is outside of {root}")
    folder = root
    for part in relative.parts:
        folder = folder / part
        if part == "..":
            raise WriteError(folder, f"it is outside of {root}")
        with writing(folder), suppress(FileExistsError):
            folder.mkdir()
        if folder.is_symlink() or not folder.is_dir():
            what = "a link" if folder.is_symlink() else "not a folder"
            raise WriteError(folder, f"it is {what}; outputs must stay within {root}")
    return folder


def open_to_append(path: Path) -> BinaryIO:
    """Open a regular file for reading and appending, created if it is missing; links are not followed.

    Raises:
        WriteError: it is a link or not a regular file, or cannot be opened.
    """
    with writing(path):
        return _opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)


def _opened(path: Path, flags: int) -> BinaryIO:
    number = os.open(path, flags | _NO_FOLLOW, 0o666)
    file = os.fdopen(number, "a+b" if flags & os.O_APPEND else "r+b")
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        raise WriteError(path, "it is not a regular file")
    return file


class HeldWriter:
    """A file to write to that never raises: the first error is stored, and everything written after it is dropped.

    For C libraries that crash, print tracebacks or lose the error when the file they write to raises one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file  # unbuffered
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes at the current offset."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self.error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Resize the file."""
        try:
            return self._file.truncate(size) if self.error is None else size or 0
        except OSError as error:
            self.error = error
            return size or 0

    def read(self, size: int = -1) -> bytes:
        """Read bytes from the current offset."""
        return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        """Read bytes from the current offset; dropped bytes are zeros."""
        view = memoryview(buffer).cast("B")
        read = self._file.readinto(view)  # type: ignore[attr-defined]
        view[read:] = bytes(len(view) - read)
        return len(view)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to an offset."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the current offset."""
        return self._file.tell()

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""


@contextmanager
def errors_held(path: Path) -> Iterator[HeldWriter]:
    """Open a file to write to, and raise its first error at the end, instead of any that follow from it."""
    with open(path, "w+b", buffering=0) as file:
        held = HeldWriter(file)
        try:
            yield held
        finally:
            if held.error is not None:
                raise held.error


@contextmanager
def claimed(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Keep other processes from writing `path` inside the `with` block; a kill releases the claim.

    Args:
        path: the file to write.
        wait: seconds to wait for another process to end.

    Raises:
        BusyError: another process is writing it.
        WriteError: the folder cannot be created or written to.
    """
    from filelock import FileLock, Timeout  # slow to import, and few commands need it

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        place = path.with_name(f".{path.name}.lock")
        if place.is_symlink():
            raise WriteError(place, "it is a link")
        lock = FileLock(place, timeout=0)
        try:
            try:
                lock.acquire()
            except Timeout:
                if not wait:
                    raise
                logger.info("another process is writing %s; waiting for it, %g s at most", path, wait)
                lock.acquire(timeout=wait)
        except Timeout as error:
            raise BusyError(f"another process is writing {path}; wait for it, or choose another output") from error
    try:
        yield
    finally:
        # Before the release: afterwards it could be the file that the next process has locked.
        with suppress(OSError):  # Windows does not remove an open file; releasing the lock does then
            Path(lock.lock_file).unlink()
        lock.release()
