"""Catch what C libraries print on standard error, for the thread that calls them.

libmpg123, within libsndfile, reports damaged MP3 files on C's `stderr`, and libsndfile has no switch for that. In
glibc, `stderr` is a variable: it is set to a stream that passes on to Python what is printed. File descriptor 2, which
Python itself writes to, is never touched. With other C libraries, nothing is caught.
"""

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_UNBUFFERED = 2  # _IONBF of <stdio.h>
_Write = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_here = threading.local()  # .caught: the list for what this thread prints
_lock = threading.Lock()
_users = 0  # how many threads are catching


class _Functions(ctypes.Structure):
    """cookie_io_functions_t of <stdio.h>."""

    _fields_ = (
        ("read", ctypes.c_void_p),
        ("write", _Write),
        ("seek", ctypes.c_void_p),
        ("close", ctypes.c_void_p),
    )


def _write(_: int, data: int, size: int) -> int:
    """Take what a thread prints; called by C."""
    text = ctypes.string_at(data, size)
    caught: list[bytes] | None = getattr(_here, "caught", None)
    if caught is None:
        os.write(2, text)
    else:
        caught.append(text)
    return size


_written = _Write(_write)


@cache
def _streams() -> tuple[Any, Any, Any] | None:
    """Return the variable `stderr`, its usual value, and a stream that calls `_written`; None if there is none such."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.fopencookie.restype = ctypes.c_void_p
    libc.fopencookie.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _Functions)
    libc.setvbuf.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    stream = libc.fopencookie(None, b"w", _Functions(write=_written))
    if not stream:
        return None
    libc.setvbuf(stream, None, _UNBUFFERED, 0)
    variable = ctypes.c_void_p.in_dll(libc, "stderr")
    return variable, variable.value, stream


@contextmanager
def catching(caught: list[bytes]) -> Iterator[None]:
    """Append to `caught` what C libraries print on standard error in this thread."""
    global _users
    streams = _streams()
    if streams is None:
        yield
        return
    variable, usual, ours = streams
    with _lock:
        _users += 1
        variable.value = ours
    _here.caught = caught
    try:
        yield
    finally:
        _here.caught = None
        with _lock:
            _users -= 1
            if not _users:
                variable.value = usual
