"""What a source of sound holds, block by block and as it is stored: files of any kind, bytes, streams, arrays."""

import io
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from ced.errors import AudioError, install_command
from ced.sound.media import MEDIA_KINDS, Opened, is_address, is_installed, open_address, open_media
from ced.sound.plainwav import plain_wav
from ced.sound.whole import announces_length, is_cut

AUDIO_SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64"}
)
_KINDS = "WAV, FLAC, OGG, Opus, MP3, AIFF, AU, CAF, W64"
FULL_SCALE = 32_768  # the int16 that stands for 1.0
LOUDEST = 1e6  # floats beyond it are not sound, but other data, or scaled by mistake; models fail at far higher ones
_MAX_CHANNELS = 1024  # as libsndfile; more of them are an array with its axes swapped
_LEAST_READ = 1 << 16  # frames, for files that announce nothing
_SLACK = 0.1  # seconds that a file may lack of its announced length: the ends of MP3 files are padded
_FLAC_STEP = 4096  # frames; a fault loses the read it happens in, and a cut FLAC file is a fault

_log = logging.getLogger(__name__)

Source = str | os.PathLike[str] | bytes | BinaryIO | tuple[NDArray[Any], int]


def name_of(source: Source) -> str:
    """Return what a source is called in messages and results: its path, or what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes | tuple):
        return "<bytes>" if isinstance(source, bytes) else "<array>"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "<file>"


@dataclass(frozen=True, eq=False)
class Sound:
    """A source while it is open, as it is stored."""

    name: str
    rate: int
    channels: int
    blocks: Iterator[NDArray[Any]]  # (t, channels), int16 or float32, as `checked`; one at least and none empty


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # soundfile ships no types
    """A sound file read from front to back: soundfile seeks after every read, which MP3 decoding does not survive."""

    def seekable(self) -> bool:
        return False


@contextmanager
def opened(source: Source, block_seconds: float) -> Iterator[Sound]:
    """Open a source whose blocks are up to `block_seconds` long; whatever is wrong with it comes as AudioError."""
    name = name_of(source)
    with ExitStack() as stack:
        if isinstance(source, tuple):
            rate, channels, read = _open_array(source)
        elif isinstance(source, str) and is_address(source):
            rate, channels, read = open_address(source, stack)
        elif isinstance(source, str | os.PathLike):
            rate, channels, read = _open_path(os.fspath(source), name, stack)
        else:
            rate, channels, read = _open_file(_seekable(source, name), name, stack)
        blocks = read(max(1, round(block_seconds * rate)))
        yield Sound(name, rate, channels, _not_empty(checked(blocks, name, rate), name))


def _open_path(path: str, name: str, stack: ExitStack) -> Opened:
    try:
        file = stack.enter_context(io.FileIO(path))
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            return _open_file(_seekable(file.read(), name), name, stack)
        if (wav := plain_wav(file)) is not None:
            return wav.rate, wav.channels, partial(wav.blocks, file)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise AudioError(f"cannot read {name}: {reason}") from error
    if not status.st_size:
        raise AudioError(f"{name} is empty (0 bytes)")
    # As bytes, names that are not valid text are readable too; Windows has no such names.
    return _open_file(file, name, stack, path if os.name == "nt" else os.fsencode(path))


def _seekable(source: bytes | BinaryIO, name: str) -> BinaryIO:
    """Return a file that libsndfile can move about in."""
    if not isinstance(source, bytes):
        if not hasattr(source, "read"):
            kinds = "a path, the bytes of a file, a binary file or (samples, rate)"
            raise AudioError(f"a {type(source).__name__} is no source of sound; expected {kinds}")
        if source.seekable():
            return source
        source = source.read()
    if not source:
        raise AudioError(f"{name} is empty (0 bytes)")
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


def _open_file(file: BinaryIO, name: str, stack: ExitStack, path: str | bytes | None = None) -> Opened:
    """Open a file with libsndfile, by its path if it has one, which is faster."""
    cut = is_cut(file)
    try:
        sound = stack.enter_context(_ForwardFile(path or file))
    except soundfile.LibsndfileError as error:
        if (media := open_media(file, name, cut, stack)) is not None:
            return media
        more = f", {MEDIA_KINDS}" if is_installed() else f"; {install_command('media')} adds {MEDIA_KINDS}"
        message = f"cannot decode {name}: {_reason(error)}; readable are whole files of {_KINDS}{more}"
        raise AudioError(message) from error
    except TypeError as error:  # soundfile wants to be told what headerless files (.raw) hold
        raise AudioError(f"cannot decode {name}: it has no header; readable are {_KINDS}") from error
    announced = sound.frames
    if sound.format == "MP3" and not announces_length(file):
        if (media := open_media(file, name, cut, stack)) is not None:
            return media
        whole = install_command("media")
        _log.warning("%s does not say how long it is, so its end may be missing; to read it whole: %s", name, whole)
        announced = 0
    return sound.samplerate, sound.channels, partial(_file_blocks, sound, name, announced, cut)


def _reason(error: soundfile.LibsndfileError) -> str:
    reason: str = error.error_string.strip().rstrip(".")
    if reason.startswith("File does not exist"):  # what libsndfile says of an MP3 file that breaks off in its header
        return "the file is malformed"
    return reason.removeprefix("Error : ")


def _file_blocks(
    file: soundfile.SoundFile, name: str, announced: int, cut: bool, frames: int
) -> Iterator[NDArray[Any]]:
    """Yield blocks of `frames` frames, the last shorter, as far as the file can be decoded.

    If it breaks off - `cut`, decoded with a fault, or shorter than the frames `announced` - an error follows them.
    """
    dtype = "int16" if file.subtype == "PCM_16" else "float32"
    # One more than announced, so that one read meets the end; no more than that, as a read allocates all it asks for.
    frames = min(frames, max(file.frames, _LEAST_READ) + 1)
    step = _FLAC_STEP if file.format == "FLAC" else frames
    frames = -(-frames // step) * step  # whole steps, so that blocks of any length lose the same to a fault
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
            yield join(parts)
    if fault is not None and not done:
        raise AudioError(f"cannot decode {name}: {_reason(fault)}") from fault
    found, expected = done / file.samplerate, announced / file.samplerate
    if cut or fault is not None or found < expected - _SLACK:
        of = f" of {expected:.2f} s" if expected > found else ""
        raise AudioError(f"{name} is cut short: it breaks off after {found:.2f} s{of}") from fault


def _open_array(source: tuple[NDArray[Any], int]) -> Opened:
    expected = "expected (samples, rate) with samples (t,) or (t, channels) and rate in hertz"
    if len(source) != 2 or not isinstance(source[1], Integral) or source[1] < 1:
        kinds = ", ".join(type(part).__name__ for part in source)
        raise AudioError(f"<array> is a tuple of ({kinds}); {expected}, a positive whole number")
    samples = np.asarray(source[0])
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.shape[1] > _MAX_CHANNELS:
        raise AudioError(f"<array> has samples of shape {np.shape(source[0])}; {expected}")
    if samples.dtype.kind not in "iuf":
        raise AudioError(f"<array> has samples of type {samples.dtype}; expected integers or floats")
    if not samples.shape[1]:
        raise AudioError(f"<array> has samples of shape {samples.shape}, without a channel; {expected}")
    return int(source[1]), samples.shape[1], partial(_array_blocks, samples)


def _array_blocks(samples: NDArray[Any], frames: int) -> Iterator[NDArray[Any]]:
    for start in range(0, len(samples), frames):
        yield samples[start : start + frames]


def checked(blocks: Iterable[NDArray[Any]], name: str, rate: int) -> Iterator[NDArray[Any]]:
    """Pass blocks on as int16 or float32.

    Args:
        blocks: samples (t, channels) of any integer or float type.
        name: what messages call their source.
        rate: their sampling rate.

    Raises:
        AudioError: a sample is not a number, or so far from [-1, 1] that it is no sound.
    """
    done = 0
    for block in blocks:
        if block.dtype.kind == "f" and block.size:
            least, most = float(block.min()), float(block.max())  # nan, if any sample is
            if not (least >= -LOUDEST and most <= LOUDEST):
                raise AudioError(f"{name} has {_impossible(block, done, rate)}")
        done += len(block)
        yield block if block.dtype == np.int16 else to_float(block)


def _impossible(block: NDArray[Any], done: int, rate: int) -> str:
    """Say which is the first sample of a block, with `done` frames before it, that cannot be of a sound."""
    samples = block.astype(np.float64)
    frame, channel = np.argwhere(~(np.abs(samples) <= LOUDEST))[0]
    value, place = samples[frame, channel], f"{(done + frame) / rate:.3f} s"
    if not np.isfinite(value):
        return f"samples that are not finite numbers, the first at {place}"
    return f"a sample of {value:g} at {place}; sound is in [-1, 1], and nothing beyond {LOUDEST:g} is taken for it"


def _not_empty(blocks: Iterator[NDArray[Any]], name: str) -> Iterator[NDArray[Any]]:
    found = False
    for block in blocks:
        found = True
        yield block
    if not found:
        raise AudioError(f"{name} holds no samples")


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
