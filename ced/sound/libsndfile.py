"""Sound that libsndfile reads: WAV, FLAC, OGG, Opus, MP3, AIFF, AU, CAF and others (soundfile)."""

import io
import re
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from functools import partial

import numpy as np
import soundfile

from ced.errors import AudioError, install_command
from ced.sound.cstderr import catching
from ced.sound.ffmpeg import MEDIA_KINDS, is_installed, open_media
from ced.sound.reading import Block, Opened, Reading
from ced.sound.truncation import SLACK, Part, mp3_frames_at
from ced.sound.view import View

_KINDS = "WAV, FLAC, OGG, Opus, MP3, AIFF, AU, CAF, W64"
_BUFFER = 1 << 16  # bytes
_LEAST_READ = 1 << 16  # frames, for files that announce nothing
_STEP = 4096  # frames of FLAC and MP3; a fault loses the read it happens in, and a cut FLAC file is a fault
_EXACT = 0.001  # seconds that formats with an exact length may lack
_MOST_FAULTS = 1000  # in a row; behind a fault in an MP3 file, libsndfile looks for the next frame in a kilobyte
_MOST_FRAMES = 1 << 50  # more are libsndfile's way to say that the number is not known
_INSPECTED = {"WAV", "WAVEX", "RF64", "AIFF", "AU", "CAF", "W64", "OGG", "FLAC", "MP3"}  # by ced.sound.truncation
_TRUNCATED = re.compile("should be|truncated")  # in libsndfile's log, of other formats


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # soundfile ships no types
    """A sound file read from front to back: soundfile seeks after every read, which MP3 decoding does not survive."""

    def seekable(self) -> bool:
        return False


def open_part(view: View, part: Part, complete: bool | None, reading: Reading, stack: ExitStack) -> Opened:
    """Open a part of a file, with FFmpeg if libsndfile cannot read it, or not to its end.

    Args:
        view: the file.
        part: the part of it.
        complete: whether all of the part is known to be there.
        reading: where faults and warnings are noted.
        stack: closes what is opened.

    Raises:
        AudioError: neither can read it, or there is no sound in it; also from the blocks.
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
    # Of a stream, libsndfile guesses the length; of a cut OGG file, it takes what is there.
    unknown = file.frames > _MOST_FRAMES or not part.counted or (complete is False and file.format == "OGG")
    announced = None if unknown else file.frames
    blocks = partial(_blocks, file, buffered, reading, announced, complete)
    seconds = None if announced is None else announced / file.samplerate
    return Opened(file.samplerate, file.channels, blocks, seconds)


def _open(source: "io.BufferedReader[View]", stack: ExitStack) -> "_ForwardFile | AudioError":
    """Open a file with libsndfile; return what is wrong where it cannot."""
    try:
        with catching([]):
            file = _ForwardFile(source)
        stack.callback(file.close)
        return file
    except soundfile.LibsndfileError as error:
        return AudioError(_reason(error))


def _reason(error: soundfile.LibsndfileError) -> str:
    reason: str = error.error_string.strip().rstrip(".")
    if "resource fork" in reason or "offset" in reason:  # errors of libsndfile that tell a user nothing
        return "Format not recognised"
    if "SF_INFO" in reason:
        return "its header has an impossible rate or number of channels"
    return reason.removeprefix("Error : ")


def _blocks(
    file: soundfile.SoundFile,
    source: "io.BufferedReader[View]",
    reading: Reading,
    announced: int | None,
    complete: bool | None,
    frames: int,
) -> Iterator[Block]:
    """Yield blocks of `frames` frames, the last shorter, as far as the file can be decoded."""
    dtype = "int16" if file.subtype == "PCM_16" else "float32"
    # One more than announced, so that one read meets the end; no more than that, as a read allocates all it asks for.
    frames = min(frames, max(announced or 0, _LEAST_READ) + 1)
    step = _STEP if file.format in ("FLAC", "MP3") else frames
    frames = -(-frames // step) * step  # full steps, so that blocks of any length lose the same to a fault
    resumes = file.format == "MP3" and not is_installed()  # libsndfile can go on behind a fault, but FFmpeg finds more
    done, faults, ended, failed = 0, 0, False, False
    fault: Exception | None = None
    printed: list[bytes] = []
    while not ended:
        block = np.empty((frames, file.channels), dtype)
        filled = 0
        while filled < frames and not ended:
            wanted = min(step, frames - filled)
            try:
                with catching(printed):
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
        further, position = yield from _by_ffmpeg(seen, reading, done, file, frames)
        missing -= further
        if further and file.format == "FLAC" and announced is not None and complete is None:
            complete = position > (announced - 0.5) / file.samplerate
        failed &= not further
    if announced is None and file.format == "MP3" and mp3_frames_at(seen, source.tell()) is not None:
        unread = seen.size - source.tell()
        lost = unread / (seen.size - unread) * reading.seconds
        reading.expected_seconds, reading.broken = reading.seconds + lost, True
        need = install_command("media")
        reading.warn(f"its length is not in its header, so the end, about {lost:.0f} s, needs FFmpeg: {need}")
    elif complete is False or (failed and complete is not True) or (missing > slack and complete is None):
        reading.broken = True
    elif missing > slack or failed:
        reading.warn(f"{missing:.2f} s are missing within it, where its data is damaged{_reported(printed)}")
    elif report := _reported(printed):
        reading.warn(f"damaged{report}")


def _reported(printed: list[bytes]) -> str:
    """Return what libmpg123 printed about errors, to be added to a warning.

    Its notes are left out: they are about bytes between frames.
    """
    lines = b"".join(printed).decode(errors="replace").splitlines()
    errors = [line.partition("error: ")[2].partition(" - ")[0].strip() for line in lines if "error: " in line]
    times = f", {len(errors)} times" if len(errors) > 1 else ""
    return f" (the MP3 decoder: {errors[0]}{times})" if errors else ""


def _by_ffmpeg(
    seen: View, reading: Reading, done: int, file: soundfile.SoundFile, frames: int
) -> Generator[Block, None, tuple[float, float]]:
    """Go on with FFmpeg where libsndfile has stopped: behind a damaged frame, or where the rate changes.

    Args:
        seen: what libsndfile read.
        reading: of the sound.
        done: how many frames were read.
        file: libsndfile's.
        frames: of a block.

    Returns:
        the seconds found, and where the last frame ends according to its time stamp.
    """
    own = Reading(reading.name, cancelled=reading.cancelled)
    further = 0.0
    held: list[Block] = []  # until they are more than what two decoders may differ by
    with ExitStack() as stack, suppress(AudioError):  # what is found before an error is good
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
