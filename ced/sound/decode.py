"""Open a source of any kind (file, bytes, stream, array, address) and decode it block by block, as it is stored."""

import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from numbers import Integral
from typing import Any, BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from ced.errors import AudioError, install_command
from ced.sound.ffmpeg import MEDIA_KINDS, is_address, is_installed, open_address, open_media
from ced.sound.plainwav import plain_wav
from ced.sound.reading import MOST_CHANNELS, Block, Opened, Reading
from ced.sound.truncation import announces_length, is_cut

AUDIO_SUFFIXES = frozenset(
    {".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"}
    | {".au", ".snd", ".caf", ".voc", ".sph", ".nist", ".avr", ".paf", ".pvf", ".sf", ".ircam", ".sds"}
)
_KINDS = "WAV, FLAC, OGG, Opus, MP3, AIFF, AU, CAF, W64"
FULL_SCALE = 32_768  # the int16 that stands for 1.0
LOUDEST = 1e6  # floats beyond it are not sound, but other data, or scaled by mistake; models fail at far higher ones
_LOUD = 10.0  # floats beyond it are suspicious: integers that were stored as floats without scaling
_LEAST_READ = 1 << 16  # frames, for files that announce nothing
_SLACK = 0.1  # seconds that a file may lack of its announced length: the ends of MP3 files are padded
_FLAC_STEP = 4096  # frames; a fault loses the read it happens in, and a cut FLAC file is a fault
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
    """Return what a source is called in messages and results: its path, or what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes | tuple):
        return "<bytes>" if isinstance(source, bytes) else "<array>"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "<file>"


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # soundfile ships no types
    """A sound file read from front to back: soundfile seeks after every read, which MP3 decoding does not survive."""

    def seekable(self) -> bool:
        return False


def open_source(source: Source, reading: Reading, stack: ExitStack) -> Opened:
    """Open a source; `stack` closes it.

    Raises:
        AudioError: as for `ced.sound.audio.open_sound`; also from its blocks.
    """
    if isinstance(source, tuple):
        opened = _open_array(source, reading)
    elif isinstance(source, str) and is_address(source):
        opened = open_address(source, stack, reading=reading)
    elif isinstance(source, str | os.PathLike):
        opened = _open_path(os.fspath(source), reading, stack)
    else:
        opened = _open_file(_seekable(source, reading), reading, stack)
    reading.check_form(opened.rate, opened.channels)
    return opened


def _open_path(path: str, reading: Reading, stack: ExitStack) -> Opened:
    try:
        file = stack.enter_context(_regular_file(path, reading.name))
        if (wav := plain_wav(file)) is not None:
            reading.expected_seconds = wav.frames / wav.rate
            return Opened(wav.rate, wav.channels, partial(wav.blocks, file))
        size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise AudioError(f"cannot be read: {reason}", reading.name) from error
    if not size:
        raise AudioError("empty (0 bytes)", reading.name)
    # As bytes, names that are not valid text are readable too; Windows has no such names.
    return _open_file(file, reading, stack, path if os.name == "nt" else os.fsencode(path))


def _regular_file(path: str, name: str) -> io.FileIO:
    """Open a file that has an end: pipes, devices and sockets could be waited for, or read, for ever.

    Raises:
        AudioError: it is no regular file.
        OSError, ValueError: it cannot be opened.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if stat.S_ISREG(kind):  # one that is replaced by a pipe at this moment is opened without waiting, and found below
        file = io.FileIO(os.open(path, os.O_RDONLY | _NON_BLOCKING))
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if stat.S_ISREG(kind):
            return file
        file.close()
    hint = "" if kind == stat.S_IFDIR else "; send it to standard input, and name it as -"
    raise AudioError(f"{_SPECIAL.get(kind, 'something special')}, not a regular file{hint}", name)


def _seekable(source: bytes | BinaryIO, reading: Reading) -> BinaryIO:
    """Return a file that libsndfile can move about in."""
    if not isinstance(source, bytes):
        if not hasattr(source, "read"):
            kinds = "a path, the bytes of a file, a binary file or (samples, rate)"
            raise AudioError(f"a {type(source).__name__} cannot be read as sound; expected {kinds}")
        if source.seekable():
            return source
        source = source.read()
    if not source:
        raise AudioError("empty (0 bytes)", reading.name)
    return SoundBytes(source)


class SoundBytes(io.BytesIO):
    """The bytes of a file under a name of its own.

    Seeking to an impossible place, as libsndfile does in damaged files, is no error: it would only be printed.
    """

    def __init__(self, held: bytes, name: str = "<bytes>") -> None:
        super().__init__(held)
        self.name = name

    def seek(self, place: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a place, or stay where it is impossible."""
        try:
            return super().seek(place, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _open_file(file: BinaryIO, reading: Reading, stack: ExitStack, path: str | bytes | None = None) -> Opened:
    """Open a file with libsndfile, by its path if it has one, which is faster."""
    cut = is_cut(file)
    try:
        sound = stack.enter_context(_ForwardFile(path or file))
    except soundfile.LibsndfileError as error:
        if (media := open_media(file, reading, cut, stack)) is not None:
            return media
        more = f", {MEDIA_KINDS}" if is_installed() else f"; {install_command('media')} adds {MEDIA_KINDS}"
        hint = f"readable are complete files of {_KINDS}{more}"
        raise AudioError(f"cannot be decoded: {_reason(error)}", reading.name, hint=hint) from error
    except TypeError as error:  # soundfile wants to be told what headerless files (.raw) hold
        hint = f"readable are {_KINDS}"
        raise AudioError("cannot be decoded: it has no header", reading.name, hint=hint) from error
    announced = sound.frames
    if sound.format == "MP3" and not announces_length(file):
        if (media := open_media(file, reading, cut, stack)) is not None:
            return media
        whole = install_command("media")
        reading.warn(f"its length is not in its header, so its end may be missing; to read it to the end: {whole}")
        announced = 0
    reading.expected_seconds = announced / sound.samplerate if announced else None
    return Opened(sound.samplerate, sound.channels, partial(_file_blocks, sound, reading, announced, cut))


def _reason(error: soundfile.LibsndfileError) -> str:
    reason: str = error.error_string.strip().rstrip(".")
    if reason.startswith("File does not exist"):  # what libsndfile says of an MP3 file that breaks off in its header
        return "the file is malformed"
    return reason.removeprefix("Error : ")


def _file_blocks(
    file: soundfile.SoundFile, reading: Reading, announced: int, cut: bool, frames: int
) -> Iterator[Block]:
    """Yield blocks of `frames` frames, the last shorter, as far as the file can be decoded."""
    dtype = "int16" if file.subtype == "PCM_16" else "float32"
    # One more than announced, so that one read meets the end; no more than that, as a read allocates all it asks for.
    frames = min(frames, max(file.frames, _LEAST_READ) + 1)
    step = _FLAC_STEP if file.format == "FLAC" else frames
    frames = -(-frames // step) * step  # full steps, so that blocks of any length lose the same to a fault
    done, ended, fault = 0, False, None
    while not ended:
        parts: list[NDArray[Any]] = []
        room = frames
        while room and not ended:
            try:
                part = file.read(min(step, room), dtype, always_2d=True)
            except soundfile.LibsndfileError as error:
                fault, ended = error, True
                break
            ended = len(part) < min(step, room)
            parts.append(part)
            room -= len(part)
        if room < frames:
            done += frames - room
            yield Block(join(parts), file.samplerate)
    if fault is not None and not done:
        raise AudioError(f"cannot be decoded: {_reason(fault)}", reading.name) from fault
    found, expected = done / file.samplerate, announced / file.samplerate
    if cut or fault is not None or found < expected - _SLACK:
        reading.broken(found, expected)


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
    reading.expected_seconds = len(samples) / rate
    return Opened(rate, samples.shape[1], partial(_array_blocks, samples, rate))


def _array_blocks(samples: NDArray[Any], rate: int, frames: int) -> Iterator[Block]:
    for start in range(0, len(samples), frames):
        yield Block(samples[start : start + frames], rate)


def checked(blocks: Iterable[Block], reading: Reading) -> Iterator[Block]:
    """Pass blocks on as int16 or float32, count them, and check their form, their cost and their samples.

    Raises:
        AudioError: a sample is not a number, or so far from [-1, 1] that it is not sound; a rate or a number of
            channels is out of range.
        ClosedError, TooLongError: as for `Reading.spend`.
    """
    peak = 0.0
    for block in blocks:
        samples = block.samples
        reading.check_form(block.rate, samples.shape[1])
        reading.spend(samples.size)
        if samples.dtype.kind == "f" and samples.size:
            least, most = float(samples.min()), float(samples.max())  # nan, if any sample is
            if not (least >= -LOUDEST and most <= LOUDEST):
                raise AudioError(_impossible(samples, reading.seconds, block.rate), reading.name)
            peak = max(peak, -least, most)
        reading.seconds += len(samples) / block.rate
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
    return f"a sample of {value:g} at {place}; sound is in [-1, 1], and beyond {LOUDEST:g} nothing is accepted"


def to_float(samples: NDArray[Any]) -> NDArray[np.float32]:
    """Scale integers to [-1, 1) by their full scale, unsigned ones around their middle; keep floats."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype == np.int16:  # exact in float32, and the common case
        return samples.astype(np.float32) * np.float32(1 / FULL_SCALE)
    scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
    centred = samples.astype(np.float64) - (scale if samples.dtype.kind == "u" else 0.0)
    return (centred / scale).astype(np.float32)


def join(blocks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put blocks end to end, without a copy if there is only one."""
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
