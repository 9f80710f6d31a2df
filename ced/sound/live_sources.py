"""Where live sound comes from: addresses, blocks of samples, input devices, and standard input."""

import os
import queue
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError, optional_packages
from ced.sound.audio import SAMPLE_RATE, Channel, Mix, check_channel, resampled
from ced.sound.decode import checked, is_address
from ced.sound.ffmpeg import is_rtsp, open_address, open_rtsp
from ced.sound.reading import MOST_CHANNELS, RATES, Block, Reading
from ced.sound.web import without_password

STANDARD_INPUT = "standard input"
_BLOCK = 0.1  # seconds read at a time
_SPEED = 1.25  # times real time; the fastest a stream is read that has buffered sound to catch up with
_SILENT_SECONDS = 5.0  # without a block, after which a device is lost: not every system reports an unplugged device
_QUEUED_BLOCKS = 100  # of a device; ten seconds
_PORTAUDIO = "Debian and Ubuntu have it as libportaudio2"
_NO_DEVICE = "no such input device; `ced live --list-devices` lists them"

# Names of sample formats: those of FFmpeg and SoX, and those of ALSA (`arecord -f`). The numpy type, and the bytes of a
# sample; 24-bit integers are in the lower three bytes of four, or packed.
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
_WAV_FORMATS = {
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
class LiveSource:
    """A source of live sound.

    Attributes:
        name: used in messages.
        open: opens the source and yields its sound from then on, (t,) float32 at 16 kHz; raises AudioError if it cannot
            be opened, or is lost.
        endless: reopen the source when it ends or fails; otherwise its end is final.
    """

    name: str
    open: Callable[[], Iterator[NDArray[np.float32]]]
    endless: bool = True


def address(url: str, channel: Channel = "mean") -> LiveSource:
    """Return the stream behind an http(s) or rtsp address, decoded as it arrives.

    Sound that the server has buffered is read at most 1.25 times faster than real time, until the stream has caught up.
    A password in the address is masked in the name.

    Args:
        url: the address.
        channel: as for `ced.sound.audio.open_sound`.

    Raises:
        ConfigError: the address has another scheme, or the channel is invalid.
    """
    if not (is_address(url) or is_rtsp(url)):
        raise ConfigError(f"{url} is not an http(s) or rtsp address; sounds in files are for `ced tag`")
    check_channel(channel)
    return LiveSource(without_password(url), lambda: _paced(_received(url, channel)))


def _received(url: str, channel: Channel) -> Iterator[NDArray[np.float32]]:
    with ExitStack() as stack:
        reading = Reading(without_password(url))
        opened = (open_rtsp if is_rtsp(url) else partial(open_address, live=True))(url, stack, reading)
        # Packet by packet: joining packets to longer blocks would add delay.
        yield from resampled(checked(opened.blocks(1), reading), Mix(channel, reading.name))
        if reading.broken:
            raise AudioError(reading.warnings[-1] if reading.warnings else reading.cut, reading.name)


def _paced(waves: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Yield waves at most `_SPEED` times faster than real time: servers send what they have buffered all at once."""
    due = time.monotonic()
    for wave in waves:
        time.sleep(max(0.0, due - time.monotonic()))
        due = max(due, time.monotonic()) + len(wave) / SAMPLE_RATE / _SPEED
        yield wave


def blocks(found: Iterable[NDArray[Any]], rate: int, name: str = "<blocks>", channel: Channel = "mean") -> LiveSource:
    """Return blocks (t, channels) of any integer or float type as a source, which can be opened once.

    Reading it raises AudioError at a block of another shape or type, or with samples that `ced.sound.audio.load` would
    refuse.

    Raises:
        ConfigError: the channel is invalid.
    """
    check_channel(channel)
    return LiveSource(name, lambda: _waves(_shaped(found, name), rate, name, channel), endless=False)


def _shaped(found: Iterable[NDArray[Any]], name: str) -> Iterator[NDArray[Any]]:
    for block in found:
        if block.ndim != 2 or not block.shape[1] or block.dtype.kind not in "iuf":
            what = f"a block of shape {block.shape} and type {block.dtype}"
            raise AudioError(f"{name} gives {what}; expected (t, channels) of integers or floats")
        yield block


def _waves(found: Iterable[NDArray[Any]], rate: int, name: str, channel: Channel) -> Iterator[NDArray[np.float32]]:
    """Convert blocks (t, channels) to mono waves at 16 kHz, (t,).

    Raises:
        AudioError: a sample is not a number or far outside [-1, 1], or the channel does not exist.
    """
    read = (Block(samples, rate) for samples in found)
    return resampled(checked(read, Reading(name)), Mix(channel, name))


# Input devices, through PortAudio (sounddevice).


@dataclass(frozen=True)
class Device:
    """An input device of this machine."""

    index: int
    name: str
    channels: int
    rate: int  # the device's own, in Hz
    default: bool  # used where no device is named


def devices() -> list[Device]:
    """Return the input devices of this machine.

    Raises:
        AudioError: the PortAudio library is not installed.
        MissingPackageError: sounddevice is not installed.
    """
    portaudio = _portaudio()
    default = portaudio.default.device[0]
    return [
        Device(index, each["name"], each["max_input_channels"], round(each["default_samplerate"]), index == default)
        for index, each in enumerate(portaudio.query_devices())
        if each["max_input_channels"]
    ]


def device(name: str | None = None, channel: Channel = 1) -> LiveSource:
    """Return an input device of this machine as a source.

    A process records from one device at a time: reopening a lost device ends all PortAudio streams of the process (see
    `_rescan`), so two devices would interrupt each other.

    Args:
        name: the number of the device, or any part of its name that is unique; None: the system's default.
        channel: as for `ced.sound.audio.open_sound`; most devices report more channels than are connected.

    Raises:
        ConfigError: the channel is invalid.
    """
    number = check_channel(channel)
    label = "the default input device" if name is None else f"input device {name}"
    return LiveSource(label, _Recorder(name, label, channel, number))


class _Recorder:
    """Opens an input device: each call starts a recording."""

    def __init__(self, name: str | None, label: str, channel: Channel, number: int | None) -> None:
        self._name, self._label, self._channel, self._number = name, label, channel, number
        self._opened = False

    def __call__(self) -> Iterator[NDArray[np.float32]]:
        portaudio = _portaudio()
        try:
            if self._opened:
                _rescan(portaudio)
            self._opened = True
            found = portaudio.query_devices(_device_number(self._name), "input")
            rate = round(found["default_samplerate"])
            channels = min(found["max_input_channels"], MOST_CHANNELS if self._number is None else self._number)
            recorded = _recorded(portaudio, found["index"], rate, channels, self._label)
            yield from _waves(recorded, rate, self._label, self._channel)
        except (portaudio.PortAudioError, ValueError) as error:
            raise AudioError(f"cannot record from {self._label}: {_portaudio_reason(error)}") from error


def _rescan(portaudio: Any) -> None:
    """Make PortAudio list the devices again, as a device that was lost may come back under another number.

    PortAudio lists them only when it starts, and sounddevice has no public way to restart it. All streams of the
    process end.
    """
    with suppress(portaudio.PortAudioError):  # the last start failed
        portaudio._terminate()
    portaudio._initialize()


def _device_number(name: str | None) -> int | str | None:
    """Return the number of an input device given as digits; any other name unchanged.

    Raises:
        ValueError: no input device has that number.
    """
    if name is None or not name.isdecimal():
        return name
    if int(name) not in {each.index for each in devices()}:
        raise ValueError(_NO_DEVICE)
    return int(name)


def _recorded(portaudio: Any, index: int, rate: int, channels: int, label: str) -> Iterator[NDArray[np.float32]]:
    """Yield the blocks that a device records, (t, channels); raises AudioError when no more arrive."""
    arrived: queue.Queue[NDArray[np.float32] | None] = queue.Queue(_QUEUED_BLOCKS)

    def take(block: NDArray[np.float32], *_: object) -> None:
        with suppress(queue.Full):  # PortAudio's thread must never wait
            arrived.put_nowait(block.copy())

    def end() -> None:
        with suppress(queue.Full):
            arrived.put_nowait(None)

    with portaudio.InputStream(
        rate, round(_BLOCK * rate), index, channels=channels, dtype="float32", callback=take, finished_callback=end
    ):
        while True:
            try:
                block = arrived.get(timeout=_SILENT_SECONDS)
            except queue.Empty:
                raise AudioError(f"{label} gives no sound for {_SILENT_SECONDS:g} s") from None
            if block is None:
                raise AudioError(f"{label} is lost")
            yield block


def _portaudio() -> Any:
    """Import and return sounddevice."""
    try:
        with optional_packages("recording from an input device"):
            import sounddevice
    except OSError as error:  # the package is installed, but not the library that it loads
        raise AudioError(f"input devices need the PortAudio library ({error}); {_PORTAUDIO}") from error
    return sounddevice


def _portaudio_reason(error: Exception) -> str:
    """Return the first line of PortAudio's error message."""
    lines = str(error).strip().splitlines()
    if not lines or lines[0] == "Error querying device -1":
        return _NO_DEVICE
    return lines[0]


# Standard input: samples as recording programs write them, raw or after the header of a WAV file.


@dataclass(frozen=True)
class Samples:
    """The layout of samples in a stream.

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
        """Bytes of a frame: one sample of each channel."""
        return self.channels * FORMATS[self.format.lower()][1]

    def decode(self, data: bytes) -> NDArray[Any]:
        """Convert complete frames to samples, (t, channels)."""
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
        samples: the layout of raw samples; None: a WAV header is read first.
        channel: as for `ced.sound.audio.open_sound`.

    Raises:
        ConfigError: the channel is invalid.
    """
    check_channel(channel)
    return LiveSource(STANDARD_INPUT, partial(_piped, number, samples, channel), endless=False)


def _piped(number: int, samples: Samples | None, channel: Channel) -> Iterator[NDArray[np.float32]]:
    pipe = _Pipe(number)
    layout, length = (samples, None) if samples is not None else _wav_header(pipe)
    waves = _waves(_pipe_blocks(pipe, layout, length), layout.rate, STANDARD_INPUT, channel)
    yield from _paced(waves)  # a file that is piped in is read in real time, too


class _Pipe:
    """Reads a file descriptor without a buffer: a thread blocked in a buffered read would keep the program alive."""

    def __init__(self, number: int) -> None:
        self._number = number

    def read(self, count: int) -> bytes:
        """Return `count` bytes, or fewer at the end."""
        parts: list[bytes] = []
        while count and (part := self._read(count)):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _read(self, count: int) -> bytes:
        try:
            return os.read(self._number, count)
        except OSError as error:
            raise AudioError(f"cannot be read: {error.strerror}", STANDARD_INPUT) from error


def _pipe_blocks(pipe: _Pipe, samples: Samples, length: int | None) -> Iterator[NDArray[Any]]:
    """Yield blocks of `_BLOCK` seconds to the end, or `length` bytes; an incomplete frame at the end is dropped."""
    step = max(1, round(_BLOCK * samples.rate)) * samples.frame
    while length is None or length > 0:
        data = pipe.read(step if length is None else min(step, length))
        if length is not None:
            length -= len(data)
        if not (frames := len(data) // samples.frame):
            return
        yield samples.decode(data[: frames * samples.frame])


def _wav_header(pipe: _Pipe) -> tuple[Samples, int | None]:
    """Read the header of a WAV file; return the layout of its samples, and their size in bytes if it is known.

    Raises:
        AudioError: it is no WAV header, or one of an unsupported sample format.
    """
    head = pipe.read(12)
    if not head:
        raise AudioError("empty (0 bytes)", STANDARD_INPUT)
    if head[:4] not in (b"RIFF", b"RF64") or head[8:12] != b"WAVE":
        raise AudioError("no WAV header; name the rate of raw samples with --rate", STANDARD_INPUT)
    form, room = b"", _LONGEST_HEADER
    while True:
        chunk = pipe.read(8)
        if len(chunk) < 8:
            raise AudioError("the WAV header is cut short", STANDARD_INPUT)
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            return _wav_samples(form), None if size == 0 or size >= _ENDLESS else size
        if size > room:
            raise AudioError(f"the WAV header has a chunk of {size} bytes before the samples", STANDARD_INPUT)
        room -= size
        body = pipe.read(size + size % 2)
        form = body if name == b"fmt " else form


def _wav_samples(chunk: bytes) -> Samples:
    if len(chunk) < 16:
        raise AudioError("the WAV header has no sample format (chunk 'fmt ')", STANDARD_INPUT)
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == _EXTENSIBLE and len(chunk) >= 26:
        (kind,) = struct.unpack_from("<H", chunk, 24)
    if (kind, bits) not in _WAV_FORMATS:
        what = f"WAV samples of format {kind} with {bits} bits; only PCM and floats are supported"
        raise AudioError(what, STANDARD_INPUT)
    try:
        return Samples(rate, channels, _WAV_FORMATS[kind, bits])
    except ConfigError as error:
        raise AudioError(f"the WAV header is not valid: {error}", STANDARD_INPUT) from error
