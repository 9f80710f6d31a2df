"""Open a source of any kind (file, bytes, stream, array, address) and decode it block by block, as stored.

Plain WAV files are read here: setting up a decoder takes longer than reading ten seconds of them. All other files go to
libsndfile or FFmpeg, after a look at their structure.
"""

import io
import os
import stat
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ced import remote
from ced.errors import AudioError, TooLongError
from ced.sound import shards
from ced.sound.ffmpeg import open_address
from ced.sound.libsndfile import open_part
from ced.sound.reading import MOST_CHANNELS, Block, FileRange, Opened, Reading, boundary
from ced.sound.truncation import Structure, inspect, is_chunk

AUDIO_SUFFIXES = frozenset(
    {".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"}
    | {".au", ".snd", ".caf", ".voc", ".sph", ".nist", ".avr", ".paf", ".pvf", ".sf", ".ircam", ".sds"}
)
FULL_SCALE = 32_768  # the int16 value of 1.0
LOUDEST = 1e6  # larger floats are other data, or scaled by mistake; models fail at far larger ones
_LOUD = 10.0  # larger floats are suspicious: integers stored as floats without scaling
_KEPT_IN_MEMORY = 1 << 26  # bytes of a pipe
_MOST_PIPED = 1 << 32
_WAV_HEAD = 4096  # bytes that must hold the chunks before the samples
_PCM, _BITS = 1, 16
_NON_BLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_SPECIAL = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

Source = str | os.PathLike[str] | bytes | BinaryIO | tuple[NDArray[Any], int]


def name_of(source: Source) -> str:
    """Return the name of a source in messages and results: its path, or its kind."""
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return path if remote.address_of(path) is None else remote.without_secrets(path)
    if isinstance(source, bytes | tuple):
        return "<bytes>" if isinstance(source, bytes) else "<array>"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "<file>"


def is_address(name: str) -> bool:
    """Return whether a source given as text is an http(s) address."""
    return name.lower().startswith(("http://", "https://"))


def open_source(source: Source, reading: Reading, stack: ExitStack) -> Opened:
    """Open a source; `stack` closes it.

    Raises:
        AudioError: as for `ced.sound.audio.open_sound`; also from its blocks.
    """
    with boundary(reading.name):
        if isinstance(source, tuple):
            opened = _open_array(source, reading)
        elif isinstance(source, str) and is_address(source):
            opened = open_address(source, stack, reading)
        elif isinstance(source, str | os.PathLike):
            opened = _open_path(os.fspath(source), reading, stack)
        else:
            opened = _open_file(_seekable(source, reading, stack), reading, stack)
    reading.expected_seconds = opened.seconds
    reading.check_form(opened.rate, opened.channels)
    return opened


def _open_path(path: str, reading: Reading, stack: ExitStack) -> Opened:
    if (found := shards.split_member(path)) is not None:
        return _open_file(shards.open_member(*found, reading, stack), reading, stack)
    if (address := remote.address_of(path)) is not None:
        return _open_file(stack.enter_context(remote.open_file(address)), reading, stack)
    try:
        file = stack.enter_context(_regular_file(path, reading.name))
    except ValueError as error:  # a null byte
        raise AudioError(f"cannot be read: {error}", reading.name) from error
    if (wav := plain_wav(file)) is not None:
        return Opened(wav.rate, wav.channels, partial(wav.blocks, file), wav.frames / wav.rate)
    return _open_file(file, reading, stack)


def _regular_file(path: str, name: str) -> io.FileIO:
    """Open a regular file: pipes, devices and sockets could block, or be read, forever.

    Raises:
        AudioError: it is not a regular file.
        OSError, ValueError: it cannot be opened.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if stat.S_ISREG(kind):  # it may be replaced by a pipe at this moment: opened without blocking, and checked again
        file = io.FileIO(os.open(path, os.O_RDONLY | _NON_BLOCKING))
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if stat.S_ISREG(kind):
            return file
        file.close()
    hint = "" if kind == stat.S_IFDIR else "; send it to standard input, and name it as -"
    raise AudioError(f"{_SPECIAL.get(kind, 'a special file')}, not a regular file{hint}", name)


@dataclass(frozen=True)
class PlainWav:
    """Layout of a plain WAV file: complete, with 16-bit PCM samples."""

    rate: int  # Hz
    channels: int
    frames: int
    start: int  # byte of the first sample

    def blocks(self, file: BinaryIO, frames: int) -> Iterator[Block]:
        """Yield the samples of the open file as int16, up to `frames` frames a block."""
        file.seek(self.start)
        for done in range(0, self.frames, frames):
            count = min(frames, self.frames - done) * self.channels
            yield Block(np.fromfile(file, "<i2", count).reshape(-1, self.channels), self.rate)


def plain_wav(file: BinaryIO) -> PlainWav | None:
    """Return the layout of a complete, plain WAV file; None for anything unusual, which libsndfile or FFmpeg reads."""
    head = file.read(_WAV_HEAD)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    form: tuple[int, ...] = ()
    place = 12
    while place + 8 <= len(head):
        name, size = struct.unpack_from("<4sI", head, place)
        place += 8
        if name == b"data":
            break
        if name == b"fmt " and place + 16 <= len(head):
            form = struct.unpack_from("<HHIIHH", head, place)
        place += size + size % 2
    else:
        return None
    if not form:
        return None
    kind, channels, rate, _, frame, bits = form
    if (kind, bits, frame) != (_PCM, _BITS, 2 * channels) or not channels or not rate:
        return None
    there, end = os.fstat(file.fileno()).st_size, place + size + size % 2
    if not size or size % frame or place + size > there:
        return None
    if there - end >= 4:  # more chunks, more samples than the header announces, or another file
        view = FileRange(file, 0, there)
        if not is_chunk(view, end) or view.at(end, 4) == b"RIFF":
            return None
    return PlainWav(rate, channels, size // frame, place)


def _seekable(source: bytes | BinaryIO, reading: Reading, stack: ExitStack) -> IO[bytes]:
    """Return a seekable file: the bytes of a pipe are kept, beyond some size on disk."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not hasattr(source, "read"):
        kinds = "a path, the bytes of a file, a binary file or (samples, rate)"
        raise AudioError(f"a {type(source).__name__} cannot be read as sound; expected {kinds}")
    if source.seekable():
        return source
    kept = stack.enter_context(tempfile.SpooledTemporaryFile(_KEPT_IN_MEMORY))  # noqa: SIM115
    while data := source.read(1 << 20):
        reading.spend(0)
        kept.write(data)
        if kept.tell() > _MOST_PIPED:
            raise AudioError(f"more than {_MOST_PIPED >> 30} GiB come through a pipe; save it as a file", reading.name)
    return kept


class SoundBytes(io.BytesIO):
    """The bytes of a file, with a name."""

    def __init__(self, held: bytes, name: str = "<bytes>") -> None:
        super().__init__(held)
        self.name = name


def _open_file(file: IO[bytes] | FileRange, reading: Reading, stack: ExitStack) -> Opened:
    """Open the sound in a file, or the several sounds of joined files, one after the other."""
    view = FileRange(file, 0, file.seek(0, os.SEEK_END))
    if not view.size:
        raise AudioError("empty (0 bytes)", reading.name)
    reading.size = view.size
    structure = inspect(view)
    if structure.fault is not None:
        raise AudioError(structure.fault, reading.name)
    for warning in structure.warnings:
        reading.warn(warning)
    if len(structure.parts) == 1:
        opened = open_part(view, structure.parts[0], structure.complete, reading, stack)
        return opened if structure.seconds is None else replace(opened, seconds=structure.seconds)
    return _open_joined(view, structure, reading, stack)


def _open_joined(view: FileRange, structure: Structure, reading: Reading, stack: ExitStack) -> Opened:
    """Open the first of joined files that can be opened; its blocks are followed by those of the others."""
    total = len(structure.parts)
    fault = AudioError("no samples", reading.name)
    for number, part in enumerate(structure.parts, 1):
        reading.spend(0)
        try:
            first = open_part(view, part, number < total or structure.complete, reading, stack)
        except AudioError as error:
            fault = error
            reading.warn(f"part {number} of {total} joined files: {error.reason}")
        else:
            return Opened(first.rate, first.channels, partial(_joined, view, structure, number, first, reading))
    raise fault


def _joined(
    view: FileRange, structure: Structure, first: int, opened: Opened, reading: Reading, frames: int
) -> Iterator[Block]:
    """Yield the blocks of joined files from the `first` on, which is open already, `frames` of its frames at a time."""
    seconds, total = frames / opened.rate, len(structure.parts)
    found, fault = False, None
    for number in range(first, total + 1):
        reading.spend(0)
        if reading.broken:  # the part before is cut short; the sound continues here
            reading.warn(f"part {number - 1} of {total} joined files: {fault.reason if fault else reading.cut}")
            reading.broken = False
        fault = None
        try:
            with ExitStack() as stack:
                if number > first:
                    complete = number < total or structure.complete
                    opened = open_part(view, structure.parts[number - 1], complete, reading, stack)
                for block in opened.blocks(opened.frames(seconds)):
                    found = True
                    yield block
        except TooLongError:
            raise
        except AudioError as error:
            fault, reading.broken = error, True
    if fault is not None:
        if not found:
            raise fault
        reading.warn(f"part {total} of {total} joined files: {fault.reason}")


def _open_array(source: tuple[NDArray[Any], int], reading: Reading) -> Opened:
    name, expected = reading.name, "expected (samples, rate) with samples (t,) or (t, channels) and rate in hertz"
    if len(source) != 2 or not isinstance(source[1], Integral) or source[1] < 1:
        kinds = ", ".join(type(part).__name__ for part in source)
        raise AudioError(f"a tuple of ({kinds}); {expected}, a positive whole number", name)
    samples = np.asarray(source[0])
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.shape[1] > MOST_CHANNELS:
        raise AudioError(f"samples of shape {np.shape(source[0])}; {expected}, at most {MOST_CHANNELS} channels", name)
    if samples.dtype.kind not in "iuf":
        raise AudioError(f"samples of type {samples.dtype}; expected integers or floats", name)
    if not samples.shape[1]:
        raise AudioError(f"samples of shape {samples.shape}, without a channel; {expected}", name)
    rate = int(source[1])
    return Opened(rate, samples.shape[1], partial(_array_blocks, samples, rate), len(samples) / rate)


def _array_blocks(samples: NDArray[Any], rate: int, frames: int) -> Iterator[Block]:
    for start in range(0, len(samples), frames):
        yield Block(samples[start : start + frames], rate)


def _guarded(blocks: Iterable[Block], name: str) -> Iterator[Block]:
    """Pass blocks on; any error of their decoder becomes AudioError."""
    with boundary(name):
        yield from blocks


def checked(blocks: Iterable[Block], reading: Reading) -> Iterator[Block]:
    """Pass blocks on as int16 or float32; count them, and check their rate, channels, size and samples.

    Raises:
        AudioError: a sample is not finite, or so far outside [-1, 1] that it is not sound; a rate or a number of
            channels is out of range.
        ClosedError, TooLongError: as for `Reading.spend`.
    """
    peak = 0.0
    for block in _guarded(blocks, reading.name):
        samples = block.samples
        reading.check_form(block.rate, samples.shape[1])
        reading.spend(samples.size)
        if samples.dtype.kind == "f" and samples.size:
            least, most = float(samples.min()), float(samples.max())  # nan, if any sample is
            if not (least >= -LOUDEST and most <= LOUDEST):
                raise AudioError(_impossible(samples, reading.seconds, block.rate), reading.name)
            peak = max(peak, -least, most)
        reading.passed(len(samples), block.rate)
        yield block if samples.dtype == np.int16 else Block(to_float(samples), block.rate)
    if peak > _LOUD:
        reading.warn(
            f"samples are as large as {peak:g}; floats should be in [-1, 1], so these may be unscaled integers"
        )


def _impossible(block: NDArray[Any], begin: float, rate: int) -> str:
    """Describe the first sample of a block that cannot be sound; the block begins at `begin` seconds."""
    samples = block.astype(np.float64)
    frame, channel = np.argwhere(~(np.abs(samples) <= LOUDEST))[0]
    value, place = samples[frame, channel], f"{begin + frame / rate:.3f} s"
    if not np.isfinite(value):
        return f"samples that are not finite numbers, the first at {place}"
    return f"a sample of {value:g} at {place}; sound is in [-1, 1], and at most {LOUDEST:g} is accepted"


def to_float(samples: NDArray[Any]) -> NDArray[np.float32]:
    """Scale integers to [-1, 1) by their full scale, unsigned ones around their middle; keep floats."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype == np.int16:  # exact in float32, and the common case
        return samples.astype(np.float32) * np.float32(1 / FULL_SCALE)
    scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
    centred = samples.astype(np.float64) - (scale if samples.dtype.kind == "u" else 0.0)
    return (centred / scale).astype(np.float32)
