"""Decode with FFmpeg (PyAV): MP4, M4A, WebM and other containers, http(s) addresses, and RTSP streams."""

import ctypes
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, optional_packages
from ced.sound.reading import Block, FileRange, Opened, Reading
from ced.sound.truncation import SLACK
from ced.sound.web import PATIENCE, TrustedAddress, Web

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream, Packet
    from av.container import InputContainer

MEDIA_SUFFIXES = frozenset(
    {".m4a", ".m4b", ".m4r", ".mp4", ".m4v", ".mov", ".3gp", ".3gpp", ".3g2", ".f4v", ".f4a", ".aac", ".adts", ".latm"}
    | {".webm", ".weba", ".mkv", ".mka", ".ogv", ".ogx", ".spx", ".wma", ".wmv", ".asf", ".wtv", ".avi", ".divx"}
    | {".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2t", ".m2ts", ".mxf", ".gxf", ".dv", ".nut", ".rm", ".ra", ".rmvb"}
    | {".mp1", ".mp2", ".mpa", ".m2a", ".mpga", ".ac3", ".eac3", ".ec3", ".dts", ".mlp", ".thd", ".amr", ".awb", ".gsm"}
    | {".qcp", ".ape", ".wv", ".tta", ".tak", ".shn", ".mpc", ".mp+", ".dsf", ".dff", ".oma", ".aa3", ".at3", ".mmf"}
    | {".flv", ".sox"}
)
MEDIA_KINDS = "M4A, MP4, AAC, WebM, MKV, WMA, AVI"
_TYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}  # FFmpeg's names, numpy's
# Without any protocol, FFmpeg opens nothing itself: playlists can open files and addresses only through `Web`.
_FROM_WEB = {
    "protocol_whitelist": "none",
    "http_persistent": "0",  # would need FFmpeg's own connections, as would http_multiple
    "http_multiple": "0",
    "extension_picky": "0",  # radio stations use any suffix for playlists and parts
    "allowed_extensions": "ALL",
    "allowed_segment_extensions": "ALL",
}
_NO_DELAY = {"probesize": "32768", "analyzeduration": "1000000"}  # bytes, microseconds
# The most bytes that FFmpeg may allocate at once. A header of a few bytes can claim gigabytes, while real needs grow
# with the file: the index of an MP4 file of a day has 90 MB.
_LEAST_ALLOCATION, _MOST_ALLOCATION, _ALLOCATION = 64 << 20, 256 << 20, 4  # the last one per byte of the file
_TICKS = 1_000_000  # a second, of the durations of containers
# FFmpeg's names of formats, by where their length comes from.
_GUESSED = {"aac", "mp3", "ac3", "eac3", "dts", "amr", "mpeg", "mpegts", "loas"}  # from the bit rate
_STATED = {"matroska,webm", "avi", "flv", "asf"}  # the container states it, not each track
_COUNTED = {"ape", "wv", "tta", "tak", "mpc", "mpc8", "shn"}  # a count of samples
_MOST_PADDING = 8192  # samples that encoders append to a sound
_allocation = 0  # the present limit of FFmpeg


def is_installed() -> bool:
    """Return whether PyAV is installed."""
    return find_spec("av") is not None


@cache
def _max_alloc() -> Callable[[int], None] | None:
    """Return FFmpeg's function that limits its allocations; None where it cannot be found."""
    spec = find_spec("av._core")
    if spec is None or spec.origin is None:
        return None
    # A symbol is looked up in the extension module's dependencies too; on Windows, the library is beside the package.
    libraries = Path(spec.origin).parent.parent.glob("av.libs/avutil*.dll")
    for path in (spec.origin, *map(str, libraries)):
        function = getattr(ctypes.CDLL(path), "av_max_alloc", None)
        if function is not None:
            function.argtypes, function.restype = (ctypes.c_size_t,), None
            limit: Callable[[int], None] = function
            return limit
    return None


def _limit_allocations(size: int) -> None:
    """Limit FFmpeg's single allocations to the needs of files of up to `size` bytes; the process keeps the limit."""
    global _allocation
    wanted = max(_LEAST_ALLOCATION, min(_MOST_ALLOCATION, _ALLOCATION * size))
    limit = _max_alloc()
    if wanted > _allocation and limit is not None:
        _allocation = wanted
        limit(wanted)


def open_address(address: str, stack: ExitStack, reading: Reading, *, live: bool = False) -> Opened:
    """Open the first sound track behind an http(s) address, as it arrives.

    Args:
        address: http or https.
        stack: closes what is opened.
        reading: collects faults and warnings.
        live: decode as soon as the format is known; otherwise FFmpeg probes up to 5 s of it.

    Returns:
        the track; its blocks end with complete packets, so they may be a little longer than requested.

    Raises:
        MissingPackageError: PyAV is not installed.
        AudioError: the address cannot be read, or has no sound track; also from the blocks.
    """
    with optional_packages(f"reading {address}"):
        import av

    _limit_allocations(0)
    web = Web(address, private="any" if isinstance(address, TrustedAddress) else "named", live=live)
    file = stack.enter_context(web.open_stream())
    try:
        options = {**_FROM_WEB, **(_NO_DELAY if live else {})}
        kind = "hls" if file.is_playlist else None  # whatever the suffix of the address
        container = stack.enter_context(
            av.open(file, "r", kind, io_open=web.open_part, options=options, metadata_errors="replace")
        )
        return _open_track(container, reading, None, web)
    except av.FFmpegError as error:
        is_other = isinstance(error, av.error.EOFError | av.error.InvalidDataError)
        reason = "the answer is not sound (it may be empty, or a web page)" if is_other else _reason(error)
        raise web.fault or web.broken or AudioError(f"cannot be read: {reason}", address) from error


def is_rtsp(name: str) -> bool:
    """Return whether a name is an rtsp address, such as that of a camera."""
    return name.lower().startswith("rtsp://")


def open_rtsp(address: str, stack: ExitStack, reading: Reading) -> Opened:
    """Open the first sound track of an RTSP stream, as it arrives, over one TCP connection to its server.

    Arguments, result and errors are as for `open_address`.
    """
    with optional_packages(f"reading {reading.name}"):
        import av

    _limit_allocations(0)
    options = {"rtsp_transport": "tcp", "allowed_media_types": "audio", "protocol_whitelist": "tcp,rtp", **_NO_DELAY}
    try:
        container = stack.enter_context(
            av.open(address, "r", options=options, metadata_errors="replace", timeout=PATIENCE)
        )
        return _open_track(container, reading, None)
    except av.FFmpegError as error:
        raise AudioError(f"cannot be read: {_reason(error)}", reading.name) from error


def open_media(file: FileRange, reading: Reading, complete: bool | None, stack: ExitStack) -> Opened | None:
    """Open the first sound track of a file.

    Args:
        file: the file.
        reading: collects faults and warnings.
        complete: whether the file is known to be complete; None: unknown.
        stack: closes what is opened.

    Returns:
        as for `open_address`; None if PyAV is not installed, or does not know the format.

    Raises:
        AudioError: it has no sound track; also from the blocks.
    """
    if not is_installed():
        return None
    import av

    _limit_allocations(file.size)
    file.seek(0)
    try:  # without any protocol, a playlist cannot open other files or addresses
        options = {"protocol_whitelist": "none"}
        container = stack.enter_context(av.open(file, "r", options=options, metadata_errors="replace"))
    except av.FFmpegError:
        return None
    return _open_track(container, reading, complete)


def _open_track(container: "InputContainer", reading: Reading, complete: bool | None, web: Web | None = None) -> Opened:
    if not container.streams.audio:
        raise AudioError("no sound track", reading.name)
    track = container.streams.audio[0]
    if track.codec_context is None:
        raise AudioError("cannot be decoded: the codec of its sound track is not known here", reading.name)
    seconds = _announced(container, track)
    frames = _frames(container, reading, complete, seconds, web)
    first = next(frames, None)
    if first is None:
        raise AudioError(reading.cut if reading.broken else "no samples", reading.name)
    # The form is that of the first frame, not of the header: an HE-AAC header gives half the rate.
    blocks = partial(_blocks, first, frames, reading, _length(container, seconds, first.sample_rate))
    return Opened(first.sample_rate, first.layout.nb_channels, blocks, seconds)


def _announced(container: "InputContainer", track: "AudioStream") -> float | None:
    """Return the length of a track in seconds according to its file; None where FFmpeg guesses it from the bit rate."""
    if track.duration and track.time_base and container.format.name not in _GUESSED:
        return float(track.duration * track.time_base)
    if container.duration and container.format.name in _STATED:
        return container.duration / _TICKS
    return None


def _frames(
    container: "InputContainer", reading: Reading, complete: bool | None, announced: float | None, web: Web | None
) -> Iterator["AudioFrame"]:
    """Decode the first sound track; packets that cannot be decoded are skipped, with a warning.

    If nothing after such a packet can be decoded, or reading fails, the sound is cut short there. Gaps in the time
    stamps are ignored: frames are joined end to end.

    Raises:
        AudioError: nothing can be decoded, or the address of `web` points to a forbidden host.
    """
    import av

    track = container.streams.audio[0]
    track.codec_context.thread_count = 1  # several files are read at once
    faults, found, seconds = 0, False, 0.0
    last: Exception | None = None
    try:
        for packet in _in_time(container, track, reading.name):
            reading.spend(0)
            if web is not None and web.live and web.broken is not None:  # what FFmpeg still buffers is old
                break
            try:
                frames = packet.decode()
            except (av.FFmpegError, ValueError, IndexError) as error:  # FFmpeg's, PyAV's
                faults, last = faults + 1, error
                continue
            for frame in frames:
                if frame.samples:
                    found, last = True, None
                    seconds += frame.samples / frame.sample_rate
                    if frame.pts is not None and frame.time_base:
                        reading.position = float(frame.pts * frame.time_base) + frame.samples / frame.sample_rate
                    yield frame
    except av.FFmpegError as error:
        last, complete = error, False
    if web is not None:
        if web.fault is not None:
            raise web.fault
        if web.broken is not None:
            if not found:
                raise web.broken
            reading.warn(web.broken.reason)
            complete = False
        if web.missing:
            reading.warn(f"{web.missing} parts of its playlist cannot be read; they are skipped")
    if last is not None and not found:
        raise AudioError(f"cannot be decoded: {_reason(last)}", reading.name) from last
    if complete is None and announced is not None and container.format.name in _COUNTED:
        complete = seconds > announced - SLACK
    # Unannounced tags of many kinds may follow the sound of an MP3 file.
    if complete is False or (last is not None and complete is None and container.format.name != "mp3"):
        reading.broken = True
    reading.lost += faults


def _in_time(container: "InputContainer", track: "AudioStream", name: str) -> Iterator["Packet[AudioStream]"]:
    """Read packets; raise AudioError when none arrives within the time limit of the container, if it has one."""
    import av

    patience = container.read_timeout
    packets = container.demux(track)
    while True:
        start = time.monotonic()
        try:
            packet = next(packets, None)
            # Before FFmpeg reports the timeout, it returns what it has buffered; by then that is old.
            late = patience is not None and time.monotonic() - start >= float(patience)
        except av.error.ExitError:
            late = True
        except (
            IndexError
        ):  # raised by PyAV at the end, if a track appeared after the start; this track is flushed by then
            return
        if late:
            raise AudioError(f"no sound arrived for {PATIENCE:g} s", name)
        if packet is None:
            return
        yield packet


def _length(container: "InputContainer", seconds: float | None, rate: int) -> int | None:
    """Return the samples of an MP4 track without the encoder's padding at its end; None: the file does not state it.

    FFmpeg removes the padding at the start, and in other containers that at the end.
    """
    if seconds is None or "mp4" not in container.format.name:
        return None
    length = round(seconds * rate)
    # iTunes writes: 0, samples of padding at the start and at the end, samples of sound, all hexadecimal.
    words = container.metadata.get("iTunSMPB", "").split()
    try:
        stated = int(words[3], 16)
    except (IndexError, ValueError):
        return length
    return stated if 0 <= length - stated <= _MOST_PADDING else length


def _blocks(
    first: "AudioFrame", frames: Iterator["AudioFrame"], reading: Reading, length: int | None, size: int
) -> Iterator[Block]:
    """Join frames to blocks of at least `size` samples; the last block before a change of form may be shorter."""
    parts: list[NDArray[Any]] = []
    held, form = 0, (first.sample_rate, first.layout.nb_channels)
    try:
        for samples, rate in _without_padding(chain((first,), frames), length):
            if (now := (rate, samples.shape[1])) != form:
                reading.warn(
                    f"changes from {_form(*form)} to {_form(*now)} at {reading.seconds + held / form[0]:.2f} s"
                )
                if parts:
                    yield Block(np.concatenate(parts), form[0])
                parts, held, form = [], 0, now
            parts.append(samples)
            held += len(samples)
            if held >= size:  # at once, as the next frame may take long to arrive
                yield Block(np.concatenate(parts), form[0])
                parts, held = [], 0
    except AudioError:
        if parts:
            yield Block(np.concatenate(parts), form[0])
        raise
    if parts:
        yield Block(np.concatenate(parts), form[0])


def _without_padding(frames: Iterable["AudioFrame"], length: int | None) -> Iterator[tuple[NDArray[Any], int]]:
    """Yield the samples of frames (t, channels) and their rate, without padding after `length` samples.

    Samples after that are held back, and yielded after all if there are more of them than any padding has.
    """
    done, after = 0, 0
    held: list[tuple[NDArray[Any], int]] = []
    for frame in frames:
        samples, rate = _samples(frame), frame.sample_rate
        if length is None or done + len(samples) <= length:
            done += len(samples)
            yield samples, rate
            continue
        if done < length:
            yield samples[: length - done], rate
            samples, done = samples[length - done :], length
        held.append((samples, rate))
        after += len(samples)
        if after > _MOST_PADDING:
            length = None
            yield from held
            held = []


def _form(rate: int, channels: int) -> str:
    return f"{channels} channel{'s' if channels > 1 else ''} at {rate} Hz"


def _samples(frame: "AudioFrame") -> NDArray[Any]:
    """Return the samples of a frame, (t, channels), whether planar or interleaved.

    PyAV's own `to_ndarray` reads past the planes of frames with eight or more channels.
    """
    channels, kind = frame.layout.nb_channels, _TYPES[frame.format.packed.name]
    if not frame.format.is_planar:
        return np.frombuffer(memoryview(frame.planes[0]), kind, frame.samples * channels).reshape(-1, channels)
    return np.stack(
        [np.frombuffer(memoryview(plane), kind, frame.samples) for plane in frame.planes[:channels]], axis=1
    )


def _reason(error: Exception) -> str:
    """Return the message of FFmpeg, without its number and the name."""
    reason = getattr(error, "strerror", None) or str(error)
    if reason == "Immediate exit requested":  # how PyAV reports a timeout
        return f"no answer within {PATIENCE:g} s"
    return " ".join(reason.split())
