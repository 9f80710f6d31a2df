"""A stretch of a file as a file of its own."""

import io
import os
from typing import IO, Any, Union


class View(io.RawIOBase):
    """A stretch of an open file, for reading; its size stays what it was, however the file grows.

    Args:
        file: a seekable file. Others may read it in between, in the same thread.
        start, end: the stretch, in bytes.
        corrections: places, counted from `start`, and the bytes to read there instead of what the file has.
        prefix: bytes to read before the stretch.

    Attributes:
        size: bytes, the prefix included.
        fault: why a read failed, if one did: decoders written in C cannot pass exceptions on.
    """

    def __init__(
        self,
        file: Union[IO[bytes], "View"],
        start: int,
        end: int,
        corrections: tuple[tuple[int, bytes], ...] = (),
        prefix: bytes = b"",
    ) -> None:
        self._file, self._start, self._corrections, self._prefix = file, start, corrections, prefix
        self._place = 0
        self.size = len(prefix) + end - start
        self.fault: OSError | None = None

    def within(
        self, start: int, end: int, corrections: tuple[tuple[int, bytes], ...] = (), prefix: bytes = b""
    ) -> "View":
        """Return a stretch of this one, which must have neither corrections nor a prefix."""
        return View(self._file, self._start + start, self._start + end, corrections, prefix)

    def at(self, place: int, count: int) -> bytes:
        """Return up to `count` bytes from a place on.

        Raises:
            OSError: they cannot be read.
        """
        count = max(0, min(count, self.size - place))
        lead = self._prefix[place : place + count]
        count -= len(lead)
        if not count:
            return lead
        begin = max(0, place - len(self._prefix))
        self._file.seek(self._start + begin)
        data = self._file.read(count) or b""
        while len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        for where, new in self._corrections:
            first, last = max(where, begin), min(where + len(new), begin + len(data))
            if first < last:
                data = data[: first - begin] + new[first - where : last - where] + data[last - begin :]
        return lead + data

    def readinto(self, buffer: Any) -> int:
        """Read up to as many bytes as `buffer` has; 0 at the end, and where reading fails (see `fault`)."""
        target = memoryview(buffer)[: max(0, self.size - self._place)]
        try:
            if self._corrections or self._prefix or not isinstance(self._file, io.RawIOBase | io.BufferedIOBase):
                data = self.at(self._place, len(target))
                target[: len(data)] = data
                count = len(data)
            else:
                self._file.seek(self._start + self._place)
                count = self._file.readinto(target) or 0
        except OSError as error:
            self.fault, count = error, 0
        self._place += count
        return count

    def seek(self, place: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a place; to an impossible one, as decoders try in damaged files, at most as far as it is possible."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = max(0, min(base + place, 1 << 62))
        return self._place

    def tell(self) -> int:
        """Return the current place."""
        return self._place

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True
