"""Live sound on standard input: samples as recording programs write them, raw or behind the header of a WAV file."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError
from ced.sound.audio import Channel, check_channel
from ced.sound.live import BLOCK, LiveSource, paced, waves
from ced.sound.reading import MOST_CHANNELS, RATES

NAME = "standard input"
# Names of sample formats: those of FFmpeg and SoX, and those of ALSA (`arecord -f`). The numpy type, and the bytes of a
# sample; integers of 24 bits are in the lower three bytes of four, or packed.
FORMATS = {
    **dict.fromkeys(("u8",), ("u1", 1)),
    **dict.fromkeys(("s8",), ("i1", 1)),
    **dict.fromkeys(("s16le", "s16_le", "cd", "dat"), ("<i2", 2)),
    **dict.fromkeys(("s16be", "s16_be"), (">i2", 2)),
    **dict.fromkeys(("s24le", "s24_3le"), ("<i4", 3)),
    **dict.fromkeys(("s24be", "s24_3be"), (">i4", 3)),
    **dict.fromkeys(("s24_le",), ("<i4", 4)),
    **dict.fromkeys(("s32le", "s32_le"), ("<i4", 4)),
    **dict.fromkeys(("s32be", "s32_be"), (">i4", 4)),
    **dict.fromkeys(("f32le", "float_le"), ("<f4", 4)),
    **dict.fromkeys(("f32be", "float_be"), (">f4", 4)),
    **dict.fromkeys(("f64le", "float64_le"), ("<f8", 8)),
    **dict.fromkeys(("f64be", "float64_be"), (">f8", 8)),
}
_SHIFTED = {"s24_le"}  # integers that do not fill their four bytes
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # WAV's numbers of formats
_OF_WAV = {
    (_PCM, 8): "u8",
    (_PCM, 16): "s16le",
    (_PCM, 24): "s24le",
    (_PCM, 32): "s32le",
    (_FLOAT, 32): "f32le",
    (_FLOAT, 64): "f64le",
}
_ENDLESS = 0x7FFF0000  # bytes; recording programs that do not know the length write about that, or more, or 0
_LONGEST_HEADER = 1 << 20  # bytes before the samples


@dataclass(frozen=True)
class Samples:
    """How samples follow each other in a stream.

    Attributes:
        rate: in Hz.
        channels: of a frame.
        format: one of `FORMATS`.

    Raises:
        ConfigError: one of them is out of range.
    """

    rate: int
    channels: int = 1
    format: str = "s16le"

    def __post_init__(self) -> None:
        least, most = RATES
        if not least <= self.rate <= most:
            raise ConfigError(f"rate is {self.rate} Hz; it must be {least} to {most} Hz")
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise ConfigError(f"channels is {self.channels}; it must be 1 to {MOST_CHANNELS}")
        if self.format.lower() not in FORMATS:
            raise ConfigError(f"unknown sample format {self.format}; allowed: {', '.join(FORMATS)}")

    @property
    def frame(self) -> int:
        """Bytes of a sample of each channel."""
        return self.channels * FORMATS[self.format.lower()][1]

    def decode(self, data: bytes) -> NDArray[Any]:
        """Return whole frames as samples, (t, channels)."""
        name = self.format.lower()
        kind, size = FORMATS[name]
        if size == 3:
            packed = np.frombuffer(data, np.uint8).reshape(-1, 3)
            wide = np.zeros((len(packed), 4), np.uint8)
            wide[:, slice(1, 4) if kind[0] == "<" else slice(0, 3)] = packed  # the upper three bytes of four
            samples: NDArray[Any] = wide.reshape(-1).view(kind)
        else:
            samples = np.frombuffer(data, kind)
        if name in _SHIFTED:
            samples = samples << 8
        native = samples.astype(samples.dtype.newbyteorder("="), copy=False)
        return native.reshape(-1, self.channels)


def standard_input(number: int = 0, samples: Samples | None = None, channel: Channel = "mean") -> LiveSource:
    """Return the sound on standard input, or on another file descriptor, as a source; it can be opened once.

    Args:
        number: the file descriptor.
        samples: what raw samples are; None: a WAV header is read first.
        channel: as for `ced.sound.audio.open_sound`.

    Raises:
        ConfigError: `channel` is not one.
    """
    check_channel(channel)

    def opened() -> Iterator[NDArray[np.float32]]:
        pipe = _Pipe(number)
        known, length = (samples, None) if samples is not None else _header(pipe)
        found = waves(_blocks(pipe, known, length), known.rate, NAME, channel)
        return paced(found)  # a file that is sent here is heard as it sounds

    return LiveSource(NAME, opened, endless=False)


class _Pipe:
    """Reads a file descriptor without a buffer: a thread that waits in one would block the end of the program."""

    def __init__(self, number: int) -> None:
        self._number = number

    def read(self, count: int) -> bytes:
        """Return `count` bytes, or what there is of them at the end."""
        parts: list[bytes] = []
        while count and (part := self._read(count)):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _read(self, count: int) -> bytes:
        try:
            return os.read(self._number, count)
        except OSError as error:
            raise AudioError(f"cannot be read: {error.strerror}", NAME) from error


def _blocks(pipe: _Pipe, samples: Samples, length: int | None) -> Iterator[NDArray[Any]]:
    """Yield blocks of `BLOCK` seconds to the end, or `length` bytes; an incomplete frame at the end is left out."""
    step = max(1, round(BLOCK * samples.rate)) * samples.frame
    while length is None or length > 0:
        data = pipe.read(step if length is None else min(step, length))
        if length is not None:
            length -= len(data)
        if not (frames := len(data) // samples.frame):
            return
        yield samples.decode(data[: frames * samples.frame])


def _header(pipe: _Pipe) -> tuple[Samples, int | None]:
    """Read the header of a WAV file; return what its samples are, and how many bytes they have if that is known.

    Raises:
        AudioError: it is not one, or of samples that cannot be read here.
    """
    head = pipe.read(12)
    if not head:
        raise AudioError("empty (0 bytes)", NAME)
    if head[:4] not in (b"RIFF", b"RF64") or head[8:12] != b"WAVE":
        raise AudioError("no WAV header; name the rate of raw samples with --rate", NAME)
    form, room = b"", _LONGEST_HEADER
    while True:
        chunk = pipe.read(8)
        if len(chunk) < 8:
            raise AudioError("the WAV header breaks off", NAME)
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            return _form(form), None if size == 0 or size >= _ENDLESS else size
        if size > room:
            raise AudioError(f"the WAV header has a chunk of {size} bytes before the samples", NAME)
        room -= size
        body = pipe.read(size + size % 2)
        form = body if name == b"fmt " else form


def _form(chunk: bytes) -> Samples:
    if len(chunk) < 16:
        raise AudioError("the WAV header does not tell what the samples are", NAME)
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == _EXTENSIBLE and len(chunk) >= 26:
        (kind,) = struct.unpack_from("<H", chunk, 24)
    if (kind, bits) not in _OF_WAV:
        raise AudioError(f"WAV samples of format {kind} with {bits} bits; only PCM and floats are read here", NAME)
    try:
        return Samples(rate, channels, _OF_WAV[kind, bits])
    except ConfigError as error:
        raise AudioError(f"the WAV header is not valid: {error}", NAME) from error
