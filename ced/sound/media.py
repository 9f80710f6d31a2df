"""Sound that libsndfile does not read: MP4, M4A, WebM and other containers, and http(s) addresses (PyAV)."""

import errno
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, optional_packages

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream, FFmpegError, Packet
    from av.container import InputContainer

MEDIA_SUFFIXES = frozenset(
    {".m4a", ".m4b", ".mp4", ".mov", ".3gp", ".aac", ".webm", ".weba", ".mkv", ".mka"}
    | {".wma", ".wmv", ".avi", ".ac3", ".amr", ".mp2", ".mpg", ".mpeg", ".flv", ".ape", ".wv", ".tta"}
)
MEDIA_KINDS = "M4A, MP4, AAC, WebM, MKV, WMA, AVI"
# Rate, channels, and what reads so many frames a block.
Opened = tuple[int, int, Callable[[int], Iterator[NDArray[Any]]]]

_TYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}  # FFmpeg's names, numpy's
_PATIENCE = 30.0  # seconds for a server to answer, and for each read
_AT_ONCE = {"probesize": "32768", "analyzeduration": "1000000"}  # bytes, microseconds
_SCHEMES = ("http://", "https://")

_log = logging.getLogger(__name__)


def is_installed() -> bool:
    """Return whether PyAV is there."""
    return find_spec("av") is not None


def is_address(name: str) -> bool:
    """Return whether a name is an http(s) address."""
    return name.lower().startswith(_SCHEMES)


def open_address(address: str, stack: ExitStack, *, live: bool = False) -> Opened:
    """Open the first sound track behind an http(s) address, as it arrives.

    Args:
        address: where.
        stack: closes what is opened.
        live: decode as soon as the kind of sound is known; else FFmpeg waits for up to 5 s of it to be sure.

    Returns:
        its rate, channels, and blocks (t, channels) as decoded, about as long as is asked for.

    Raises:
        AudioError: PyAV is not installed, the address cannot be read, or there is no sound; by the blocks: it breaks
            off.
    """
    with optional_packages(f"reading {address}"):
        import av

    try:
        options = {**_network_options(), **(_AT_ONCE if live else {})}
        container = stack.enter_context(
            av.open(address, "r", options=options, metadata_errors="replace", timeout=_PATIENCE)
        )
    except av.FFmpegError as error:
        raise AudioError(f"cannot read {address}: {_refusal(error, address)}") from error
    return _open_track(container, address, False)


def open_media(file: BinaryIO, name: str, cut: bool, stack: ExitStack) -> Opened | None:
    """Open the first sound track of a file.

    Args:
        file: can be moved about in.
        name: what messages call it.
        cut: it is known to be cut short.
        stack: closes what is opened.

    Returns:
        as `open_address`; None if PyAV is not installed, or does not know this kind of file.

    Raises:
        AudioError: there is no sound in it; by the blocks: it breaks off.
    """
    if not is_installed():
        return None
    import av

    file.seek(0)
    try:  # without any protocol, a playlist cannot lead to other files or into the network
        options = {"protocol_whitelist": "none"}
        container = stack.enter_context(av.open(file, "r", options=options, metadata_errors="replace"))
    except av.FFmpegError:
        return None
    return _open_track(container, name, cut)


def _network_options() -> dict[str, str]:
    import ssl

    options = {"protocol_whitelist": "http,https,httpproxy,tcp,tls,crypto,data", "tls_verify": "1"}
    certificates = ssl.get_default_verify_paths().cafile
    return options if certificates is None else {**options, "ca_file": certificates}


def _open_track(container: "InputContainer", name: str, cut: bool) -> Opened:
    if not container.streams.audio:
        raise AudioError(f"{name} has no sound track")
    if container.streams.audio[0].codec_context is None:
        raise AudioError(f"cannot decode {name}: the code of its sound track is not known here")
    frames = _frames(container, name, cut)
    first = next(frames, None)
    if first is None:
        raise AudioError(f"{name} holds no samples")
    # The first frame decides, not the header: that of an HE-AAC track gives half its rate.
    return first.sample_rate, first.layout.nb_channels, partial(_blocks, first, frames, name)


def _frames(container: "InputContainer", name: str, cut: bool) -> Iterator["AudioFrame"]:
    """Decode the first sound track; packets that cannot be decoded are left out, with a warning.

    If nothing decodes behind such a packet, or the reading fails, the sound breaks off there: an error. Gaps in the
    timestamps are ignored: the sound is what the frames hold, end to end.
    """
    import av

    track = container.streams.audio[0]
    track.codec_context.thread_count = 1  # several files are read at once
    faults, found, seconds = 0, False, 0.0
    last: Exception | None = None
    try:
        for packet in _in_time(container, track, name):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                faults, last = faults + 1, error
                continue
            for frame in frames:
                if frame.samples:
                    found, last = True, None
                    seconds += frame.samples / frame.sample_rate
                    yield frame
    except av.FFmpegError as error:
        last, cut = error, True
    if last is not None and not found:
        raise AudioError(f"cannot decode {name}: {_reason(last)}") from last
    # Behind the sound of an MP3 file tags of many kinds may follow, which nothing announces.
    if cut or (last is not None and container.format.name != "mp3"):
        raise AudioError(f"{name} is cut short: it breaks off after {seconds:.2f} s") from last
    if faults:
        _log.warning("%s has %d packets that cannot be decoded; they are left out", name, faults)


def _in_time(container: "InputContainer", track: "AudioStream", name: str) -> Iterator["Packet[AudioStream]"]:
    """Read packets; raises AudioError when there is none in the time that the container has for it, if any."""
    import av

    patience = container.read_timeout
    packets = container.demux(track)
    while True:
        asked = time.monotonic()
        try:
            packet = next(packets, None)
            # Before FFmpeg says that the time is up, it hands out what it has; by then that is old.
            late = patience is not None and time.monotonic() - asked >= float(patience)
        except av.error.ExitError:
            late = True
        if late:
            raise AudioError(f"{name} gives no sound for {_PATIENCE:g} s")
        if packet is None:
            return
        yield packet


def _blocks(first: "AudioFrame", frames: Iterator["AudioFrame"], name: str, size: int) -> Iterator[NDArray[Any]]:
    """Join frames to blocks of `size` samples, as far as whole frames make them."""
    parts: list[NDArray[Any]] = []
    held, form = 0, (first.sample_rate, first.layout.nb_channels)
    try:
        for frame in chain((first,), frames):
            if (now := (frame.sample_rate, frame.layout.nb_channels)) != form:
                raise AudioError(f"{name} changes from {form[1]} channels at {form[0]} Hz to {now[1]} at {now[0]} Hz")
            parts.append(_samples(frame))
            held += frame.samples
            if held >= size:  # at once, as the next frame may be long in coming
                yield np.concatenate(parts)
                parts, held = [], 0
    except AudioError:
        if parts:
            yield np.concatenate(parts)
        raise
    if parts:
        yield np.concatenate(parts)


def _samples(frame: "AudioFrame") -> NDArray[Any]:
    """Return the samples of a frame, (t, channels), whichever way they lie in it.

    PyAV's own `to_ndarray` must not do this: it takes whatever follows a frame's planes in memory for more of them,
    where there are eight or more.
    """
    channels, kind = frame.layout.nb_channels, _TYPES[frame.format.packed.name]
    if not frame.format.is_planar:
        return np.frombuffer(memoryview(frame.planes[0]), kind, frame.samples * channels).reshape(-1, channels)
    return np.stack(
        [np.frombuffer(memoryview(plane), kind, frame.samples) for plane in frame.planes[:channels]], axis=1
    )


def _refusal(error: "FFmpegError", address: str) -> str:
    """Return why an address cannot be opened, as FFmpeg says no more than "Input/output error" of most that may be."""
    import av

    if not isinstance(error, av.error.EOFError | av.error.InvalidDataError) and error.errno != errno.EIO:
        return _reason(error)
    try:
        socket.getaddrinfo(urlsplit(address).hostname, None)
    except (OSError, ValueError):  # ValueError: it is no name of a host
        return "its host cannot be found"
    return "what it answers is no sound: nothing, a page, redirects without end, or no valid certificate"


def _reason(error: Exception) -> str:
    """Return what FFmpeg says, without its number and without the name once more."""
    reason = getattr(error, "strerror", None) or str(error)
    if reason == "Immediate exit requested":  # what a timeout comes to
        return f"no answer within {_PATIENCE:g} s"
    return " ".join(reason.split())
