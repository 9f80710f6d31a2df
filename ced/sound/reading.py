"""What the decoders of all formats share: blocks of samples, the state of reading one source, and parts of files."""

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, CedError, ClosedError, TooLongError
from ced.text import printable

RATES = (1_000, 768_000)  # Hz
MOST_CHANNELS = 64
# Samples x channels for each byte of a file. Digital silence has up to 2,300 in FLAC, 640 in Opus; bombs have 14,000.
_MOST_PER_BYTE = 2_560
_UNSUSPICIOUS = 1 << 27  # samples x channels that any file may have: 25 minutes of CD sound
_MOST_VALUES = 1 << 22  # samples x channels in a block: 16 MiB of float32, whatever a header claims

logger = logging.getLogger(__name__)


@contextmanager
def boundary(name: str) -> Iterator[None]:
    """Turn any error of a decoder into AudioError: libraries raise all kinds of errors on damaged files."""
    try:
        yield
    except CedError:
        raise
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror or error}", name) from error
    except MemoryError as error:
        raise AudioError("cannot be decoded: it needs too much memory", name) from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise AudioError(f"cannot be decoded: {type(error).__name__}: {reason}", name) from error


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """A piece of a sound as stored: samples (t, channels) of any integer or float type, and their rate in Hz."""

    samples: NDArray[Any]
    rate: int


@dataclass(frozen=True, eq=False)
class Opened:
    """A source that a decoder has opened.

    Attributes:
        rate, channels: of the first block; later ones may differ.
        blocks: takes the most frames of a block and yields blocks; can be called once.
        seconds: the length according to the header; None: the header gives none.
    """

    rate: int
    channels: int
    blocks: Callable[[int], Iterator[Block]]
    seconds: float | None = None

    def frames(self, seconds: float) -> int:
        """Return the frames to decode at a time: `seconds`, or fewer where those would take too much memory."""
        return max(1, min(round(seconds * self.rate), _MOST_VALUES // self.channels))


@dataclass(eq=False)
class Reading:
    """The state of reading one source, shared by its decoders and its reader.

    Attributes:
        name: of the source, for messages.
        budget: samples x channels that may be decoded; None: any number.
        size: bytes of the file; None: unknown. It bounds the number of samples.
        cancelled: called for each block; True ends reading with ClosedError.
        warnings: problems found, a phrase each, without the name.
        hints: what the user of this machine can do about a warning.
        expected_seconds: the length according to the header; None: the header gives none.
        position: the end of the last frame according to its time stamp, in seconds; None: unknown.
        lost: packets that could not be decoded and were skipped.
        broken: whether the source is cut short.
    """

    name: str
    budget: int | None = None
    size: int | None = None
    cancelled: Callable[[], bool] | None = None
    warnings: list[str] = field(default_factory=list)
    hints: dict[str, str] = field(default_factory=dict)
    expected_seconds: float | None = None
    position: float | None = None
    lost: int = 0
    broken: bool = False
    _spent: int = 0
    _frames: dict[int, int] = field(default_factory=dict)  # passed on, by rate; a sum of seconds would round

    @property
    def seconds(self) -> float:
        """Seconds decoded, up to the last block that was passed on."""
        return sum(frames / rate for rate, frames in self._frames.items())

    def passed(self, frames: int, rate: int) -> None:
        """Count frames as passed on."""
        self._frames[rate] = self._frames.get(rate, 0) + frames

    def warn(self, text: str, hint: str = "") -> None:
        """Add a warning, unless it was given before, and what can be done about it."""
        if text not in self.warnings:
            self.warnings.append(text)
        if hint:
            self.hints[text] = hint

    def log_warnings(self, name: str) -> None:
        """Log the warnings with their hints, under a name of the sound."""
        for warning in self.warnings:
            hint = f"; {self.hints[warning]}" if warning in self.hints else ""
            logger.warning("%s: %s%s", printable(name), warning, hint)

    def spend(self, values: int) -> None:
        """Count `values` (samples x channels) as decoded.

        Raises:
            ClosedError: the reader has cancelled.
            TooLongError: the budget is exceeded, or the file is too small for that number of samples.
        """
        if self.cancelled is not None and self.cancelled():
            raise ClosedError(f"reading {self.name} was cancelled")
        self._spent += values
        if self.budget is not None and self._spent > self.budget:
            raise TooLongError(f"longer than the {self.budget} samples (times channels) that are allowed", self.name)
        if self.size is not None and self._spent > max(_UNSUSPICIOUS, _MOST_PER_BYTE * self.size):
            more = f"more than {_MOST_PER_BYTE} samples for each of its {self.size} bytes"
            raise TooLongError(f"{more}; recordings are not compressed that much, so decoding stops", self.name)

    def check_form(self, rate: int, channels: int) -> None:
        """Refuse rates and channels that recordings do not have, and that are expensive to decode and resample.

        Raises:
            AudioError: one is out of range.
        """
        least, most = RATES
        if not least <= rate <= most:
            raise AudioError(f"the sampling rate is {rate} Hz; it must be {least} to {most} Hz", self.name)
        if not 1 <= channels <= MOST_CHANNELS:
            raise AudioError(f"{channels} channels; 1 to {MOST_CHANNELS} can be read", self.name)

    @property
    def cut(self) -> str:
        """The message for a source that is cut short."""
        expected = self.expected_seconds
        of = f" of {expected:.2f} s" if expected is not None and expected - self.seconds > 0.005 else ""
        return f"cut short: it ends after {self.seconds:.2f} s{of}"


def join_blocks(blocks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Concatenate blocks, without a copy if there is only one."""
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


class FileRange(io.RawIOBase):
    """A range of bytes of an open file as a read-only file of its own; its size is fixed, even if the file grows.

    Args:
        file: a seekable file. Other views may read it in between, in the same thread.
        start, end: the range, in bytes.
        corrections: offsets from `start`, and the bytes to read there in place of those of the file.
        prefix: bytes to read before the range.

    Attributes:
        size: bytes, the prefix included.
        fault: the error of a failed read, if any: decoders written in C cannot pass exceptions on.
    """

    def __init__(
        self,
        file: "IO[bytes] | FileRange",
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
    ) -> "FileRange":
        """Return a range of this view, which must have neither corrections nor a prefix."""
        return FileRange(self._file, self._start + start, self._start + end, corrections, prefix)

    def at(self, place: int, count: int) -> bytes:
        """Return up to `count` bytes from an offset on.

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
        """Go to an offset; impossible ones, which decoders try in damaged files, are clipped."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = max(0, min(base + place, 1 << 62))
        return self._place

    def tell(self) -> int:
        """Return the current offset."""
        return self._place

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True


def mean_of_channels(samples: NDArray[np.int16] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Average channels, (t, channels) -> (t,)."""
    channels = samples.shape[1]
    if channels == 1:
        return samples[:, 0].astype(np.float32, copy=False)
    mono = samples[:, 0].astype(np.float32)
    for channel in range(1, channels):  # by columns: numpy's mean over a short last axis is 30 times slower
        mono += samples[:, channel]
    mono /= channels
    return mono
