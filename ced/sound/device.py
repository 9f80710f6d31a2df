"""Microphones and other inputs of this machine, heard through PortAudio (sounddevice)."""

import queue
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, optional_packages
from ced.sound.audio import Channel, check_channel
from ced.sound.live import BLOCK, LiveSource, waves
from ced.sound.reading import MOST_CHANNELS

_STALL = 5.0  # seconds without sound, after which a device counts as lost: not all systems say when one is pulled out
_BACKLOG = 100  # blocks that may wait to be read, ten seconds
_LIBRARY = "Debian and Ubuntu have it as libportaudio2"

_NONE = "there is none; `ced live --list-devices` says which there are"


@dataclass(frozen=True)
class Device:
    """An input of this machine."""

    index: int
    name: str
    channels: int
    rate: int  # its own, in hertz
    default: bool  # whether it is taken where none is named


def devices() -> list[Device]:
    """Return the inputs of this machine.

    Raises:
        AudioError: sounddevice or PortAudio is not installed.
    """
    portaudio = _portaudio()
    default = portaudio.default.device[0]
    return [
        Device(index, each["name"], each["max_input_channels"], round(each["default_samplerate"]), index == default)
        for index, each in enumerate(portaudio.query_devices())
        if each["max_input_channels"]
    ]


def device(name: str | None = None, channel: Channel = 1) -> LiveSource:
    """Return an input of this machine as a source.

    A process records from one device at a time: to find one that was lost, all its streams are ended (see
    `_search_again`), so two that record at the same time would cut each other off.

    Args:
        name: its number, or any part of its name that no other has; None: the one that the system prefers.
        channel: as for `ced.sound.audio.open_sound`; most inputs claim more channels than are connected.

    Raises:
        ConfigError: `channel` is not one.
    """
    number = check_channel(channel)
    called = "the default input device" if name is None else f"input device {name}"
    opened = False

    def heard() -> Iterator[NDArray[np.float32]]:
        nonlocal opened
        portaudio = _portaudio()
        try:
            if opened:
                _search_again(portaudio)
            opened = True
            found = portaudio.query_devices(_number(name), "input")
            rate = round(found["default_samplerate"])
            channels = min(found["max_input_channels"], MOST_CHANNELS if number is None else number)
            yield from waves(_blocks(portaudio, found["index"], rate, channels, called), rate, called, channel)
        except (portaudio.PortAudioError, ValueError) as error:
            raise AudioError(f"{called} cannot be heard: {_reason(error)}") from error

    return LiveSource(called, heard)


def _search_again(portaudio: Any) -> None:
    """Let PortAudio look which devices there are, as one that was lost may be another number now.

    It looks only when it starts, and sounddevice has no public way to start it again. All streams of the process end.
    """
    with suppress(portaudio.PortAudioError):  # it did not start the last time
        portaudio._terminate()
    portaudio._initialize()


def _number(name: str | None) -> int | str | None:
    """Return the number of the input that a name of digits stands for; any other name as it is.

    Raises:
        ValueError: no input has that number.
    """
    if name is None or not name.isdecimal():
        return name
    if int(name) not in {each.index for each in devices()}:
        raise ValueError(_NONE)
    return int(name)


def _blocks(portaudio: Any, index: int, rate: int, channels: int, called: str) -> Iterator[NDArray[np.float32]]:
    """Yield what a device records, (t, channels); raises AudioError when nothing comes any more."""
    arrived: queue.Queue[NDArray[np.float32] | None] = queue.Queue(_BACKLOG)

    def take(heard: NDArray[np.float32], *_: object) -> None:
        with suppress(queue.Full):  # PortAudio's thread must never wait
            arrived.put_nowait(heard.copy())

    def end() -> None:
        with suppress(queue.Full):
            arrived.put_nowait(None)

    with portaudio.InputStream(
        rate, round(BLOCK * rate), index, channels=channels, dtype="float32", callback=take, finished_callback=end
    ):
        while True:
            try:
                block = arrived.get(timeout=_STALL)
            except queue.Empty:
                raise AudioError(f"{called} gives no sound for {_STALL:g} s") from None
            if block is None:
                raise AudioError(f"{called} is lost")
            yield block


def _portaudio() -> Any:
    """Return sounddevice, with what it needs."""
    try:
        with optional_packages("recording from an input device"):
            import sounddevice
    except OSError as error:  # the package is there, the library it speaks to is not
        raise AudioError(f"input devices need the PortAudio library ({error}); {_LIBRARY}") from error
    return sounddevice


def _reason(error: Exception) -> str:
    """Return the first line of what PortAudio says."""
    words = str(error).strip().splitlines()
    if not words or words[0] == "Error querying device -1":
        return _NONE
    return words[0]
