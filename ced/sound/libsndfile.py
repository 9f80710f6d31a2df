"""Decode files with libsndfile (soundfile): WAV, FLAC, OGG, Opus, MP3, AIFF, AU, CAF and others."""

import ctypes
import io
import os
import platform
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from typing import Any

import numpy as np
import soundfile

from ced.errors import AudioError, install_command
from ced.sound.ffmpeg import MEDIA_KINDS, is_installed, open_media
from ced.sound.reading import Block, FileRange, Opened, Reading
from ced.sound.truncation import SLACK, FilePart, mp3_frames_at

_KINDS = "WAV, FLAC, OGG, Opus, MP3, AIFF, AU, CAF, W64"
_BUFFER = 1 << 16  # bytes
_LEAST_READ = 1 << 16  # frames, for files of unknown length
_STEP = 4096  # frames of FLAC and MP3 in a read: an error, such as the end of a truncated FLAC file, loses a whole read
_EXACT = 0.001  # seconds that may be missing from formats with an exact length
_MOST_FAULTS = 1000  # in a row; after an error in an MP3 file, libsndfile searches a kilobyte for the next frame
_MOST_FRAMES = 1 << 50  # libsndfile reports more where the number is unknown
_INSPECTED = {"WAV", "WAVEX", "RF64", "AIFF", "AU", "CAF", "W64", "OGG", "FLAC", "MP3"}  # by ced.sound.truncation
_TRUNCATED = re.compile("should be|truncated")  # in libsndfile's log, for other formats


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # soundfile ships no types
    """A sound file that is never sought in: soundfile seeks after every read, which breaks MP3 decoding."""

    def seekable(self) -> bool:
        return False


def open_part(view: FileRange, part: FilePart, complete: bool | None, reading: Reading, stack: ExitStack) -> Opened:
    """Open a part of a file, with FFmpeg if libsndfile cannot read it, or not to its end.

    Args:
        view: the file.
        part: the part of it.
        complete: whether the part is known to be complete; None: unknown.
        reading: collects faults and warnings.
        stack: closes what is opened.

    Raises:
        AudioError: neither can read it, or it has no sound track; also from the blocks.
    """
    seen = view.within(part.start, part.end, part.corrections, part.prefix)
    buffered = io.BufferedReader(seen, _BUFFER)  # libsndfile reads MP3 in pieces of a frame
    if not part.counted and (media := open_media(seen, reading, complete, stack)) is not None:
        return media
    file = _open(buffered, stack)
    if isinstance(file, AudioError):
        if (media := open_media(seen, reading, complete, stack)) is not None:
            return media
        more = f", {MEDIA_KINDS}" if is_installed() else f"; {install_command('media')} adds {MEDIA_KINDS}"
        hint = f"readable are complete files of {_KINDS}{more}"
        raise AudioError(f"cannot be decoded: {file.reason}", reading.name, hint=hint) from file
    if file.format not in _INSPECTED and _TRUNCATED.search(file.extra_info):
        complete = False
    # libsndfile guesses the length of a stream, and takes that of a truncated OGG file from what is left.
    unknown = file.frames > _MOST_FRAMES or not part.counted or (complete is False and file.format == "OGG")
    announced = None if unknown else file.frames
    blocks = partial(_blocks, file, buffered, reading, announced, complete)
    seconds = None if announced is None else announced / file.samplerate
    return Opened(file.samplerate, file.channels, blocks, seconds)


def _open(source: "io.BufferedReader[FileRange]", stack: ExitStack) -> "_ForwardFile | AudioError":
    """Open a file with libsndfile, or return the error."""
    try:
        with captured_stderr([]):
            file = _ForwardFile(source)
        stack.callback(file.close)
        return file
    except soundfile.LibsndfileError as error:
        return AudioError(_reason(error))


def _reason(error: soundfile.LibsndfileError) -> str:
    reason: str = error.error_string.strip().rstrip(".")
    if "resource fork" in reason or "offset" in reason:  # misleading errors of libsndfile
        return "Format not recognised"
    if "SF_INFO" in reason:
        return "its header has an impossible rate or number of channels"
    return reason.removeprefix("Error : ")


def _blocks(
    file: soundfile.SoundFile,
    source: "io.BufferedReader[FileRange]",
    reading: Reading,
    announced: int | None,
    complete: bool | None,
    frames: int,
) -> Iterator[Block]:
    """Yield blocks of `frames` frames, the last one shorter, as far as the file can be decoded."""
    dtype = "int16" if file.subtype == "PCM_16" else "float32"
    # One more than announced, so that one read reaches the end; not more, as a read allocates all that it asks for.
    frames = min(frames, max(announced or 0, _LEAST_READ) + 1)
    step = _STEP if file.format in ("FLAC", "MP3") else frames
    frames = -(-frames // step) * step  # full steps, so that an error loses the same samples at any block length
    resumes = (
        file.format == "MP3" and not is_installed()
    )  # libsndfile can continue after an error, but FFmpeg recovers more
    done, faults, ended, failed = 0, 0, False, False
    fault: Exception | None = None
    printed: list[bytes] = []
    while not ended:
        block = np.empty((frames, file.channels), dtype)
        filled = 0
        while filled < frames and not ended:
            wanted = min(step, frames - filled)
            try:
                with captured_stderr(printed):
                    count = len(file.read(out=block[filled : filled + wanted]))
            except soundfile.LibsndfileError as error:
                reading.spend(0)
                fault, faults = error, faults + 1
                ended = failed = not resumes or faults > _MOST_FAULTS
                continue
            faults = 0
            ended = count < wanted
            filled += count
        if filled:
            done += filled
            yield Block(block[:filled], file.samplerate)
    seen = source.raw
    if seen.fault is not None:
        raise AudioError(f"cannot be read: {seen.fault.strerror or seen.fault}", reading.name) from seen.fault
    if fault is not None and not done:
        raise AudioError(f"cannot be decoded: {_reason(fault)}", reading.name) from fault
    missing = 0.0 if announced is None else (announced - done) / file.samplerate
    slack = SLACK if file.format == "MP3" else _EXACT
    if file.format in ("FLAC", "MP3") and (failed or missing > slack):
        further, position = yield from _continue_with_ffmpeg(seen, reading, done, file, frames)
        missing -= further
        if further and file.format == "FLAC" and announced is not None and complete is None:
            complete = position > (announced - 0.5) / file.samplerate
        failed &= not further
    if announced is None and file.format == "MP3" and mp3_frames_at(seen, source.tell()) is not None:
        unread = seen.size - source.tell()
        lost = unread / (seen.size - unread) * reading.seconds
        reading.expected_seconds, reading.broken = reading.seconds + lost, True
        about = f"its length is not in its header, so the end, about {lost:.0f} s, cannot be read without FFmpeg"
        reading.warn(about, hint=install_command("media"))
    elif complete is False or (failed and complete is not True) or (missing > slack and complete is None):
        reading.broken = True
    elif missing > slack or failed:
        reading.warn(f"{missing:.2f} s are missing within it, where its data is damaged{_reported(printed)}")
    elif report := _reported(printed):
        reading.warn(f"damaged{report}")


def _reported(printed: list[bytes]) -> str:
    """Return the errors that libmpg123 printed, as the end of a warning, without its notes on bytes between frames."""
    lines = b"".join(printed).decode(errors="replace").splitlines()
    errors = [line.partition("error: ")[2].partition(" - ")[0].strip() for line in lines if "error: " in line]
    times = f", {len(errors)} times" if len(errors) > 1 else ""
    return f" (the MP3 decoder: {errors[0]}{times})" if errors else ""


def _continue_with_ffmpeg(
    seen: FileRange, reading: Reading, done: int, file: soundfile.SoundFile, frames: int
) -> Generator[Block, None, tuple[float, float]]:
    """Continue with FFmpeg where libsndfile has stopped: after a damaged frame, or where the rate changes.

    Args:
        seen: the bytes that libsndfile read.
        reading: the state of the sound.
        done: frames already read.
        file: the file in libsndfile.
        frames: of a block.

    Returns:
        the seconds found, and the end of the last frame according to its time stamp.
    """
    own = Reading(reading.name, cancelled=reading.cancelled)
    further = 0.0
    held: list[Block] = []  # until there are more than two decoders may differ by
    with ExitStack() as stack, suppress(AudioError):  # blocks before an error are kept
        opened = open_media(seen, own, None, stack)
        for block in opened.blocks(frames) if opened is not None else ():
            count = len(block.samples)
            own.passed(count, block.rate)
            if (block.rate, block.samples.shape[1]) == (file.samplerate, file.channels):
                samples = block.samples[min(done, count) :]
                done -= count - len(samples)
            else:
                samples, done = block.samples, 0
            if len(samples):
                held.append(Block(samples, block.rate))
                further += len(samples) / block.rate
            if further > SLACK or file.format == "FLAC":
                yield from held
                held = []
    for warning in own.warnings:
        reading.warn(warning)
    return further - sum(len(block.samples) / block.rate for block in held), own.position or 0.0


# Capture of C's standard error, for the thread that calls C.
#
# libmpg123, within libsndfile, reports damaged MP3 files on C's `stderr`, and libsndfile has no switch for that. In
# glibc, `stderr` is a variable: it is set to a stream whose write function is in Python. File descriptor 2, which
# Python itself writes to, is never touched. With other C libraries, nothing is captured.

_UNBUFFERED = 2  # _IONBF of <stdio.h>
_Write = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_here = threading.local()  # .caught: the list for the output of this thread
_lock = threading.Lock()
_users = 0  # threads that are capturing


class _Functions(ctypes.Structure):
    """cookie_io_functions_t of <stdio.h>."""

    _fields_ = (
        ("read", ctypes.c_void_p),
        ("write", _Write),
        ("seek", ctypes.c_void_p),
        ("close", ctypes.c_void_p),
    )


def _write(_: int, data: int, size: int) -> int:
    """Store what a thread prints; called by C."""
    text = ctypes.string_at(data, size)
    caught: list[bytes] | None = getattr(_here, "caught", None)
    if caught is None:
        os.write(2, text)
    else:
        caught.append(text)
    return size


_written = _Write(_write)


@cache
def _c_streams() -> tuple[Any, Any, Any] | None:
    """Return the variable `stderr`, its usual value, and a stream that calls `_written`; None without glibc."""
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
def captured_stderr(caught: list[bytes]) -> Iterator[None]:
    """Append to `caught` what C libraries print on standard error in this thread."""
    global _users
    streams = _c_streams()
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
