"""Microphones and other inputs of this machine, heard through PortAudio (sounddevice)."""

import queue
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError
from ced.sound import audio
from ced.sound.live import BLOCK, LiveSource

_STALL = 5.0  # seconds without sound, after which a device counts as lost: not all systems say when one is pulled out
_BACKLOG = 100  # blocks that may wait to be read, ten seconds
_LIBRARY = "Debian and Ubuntu have it as libportaudio2"


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


def device(name: str | None = None) -> LiveSource:
    """Return an input of this machine as a source; its first channel is heard.

    Args:
        name: its number, or any part of its name that no other has; None: the one that the system prefers.
    """
    called = "the default input device" if name is None else f"input device {name}"
    opened = False

    def heard() -> Iterator[NDArray[np.float32]]:
        nonlocal opened
        portaudio = _portaudio()
        if opened:  # it looks for devices only once, and one that was lost may be another number now
            portaudio._terminate()
            portaudio._initialize()
        opened = True
        try:
            found = portaudio.query_devices(int(name) if name and name.isdecimal() else name, "input")
            rate = round(found["default_samplerate"])
            yield from audio.resampled(_blocks(portaudio, found["index"], rate, called), rate)
        except (portaudio.PortAudioError, ValueError) as error:
            raise AudioError(f"{called} cannot be heard: {_reason(error)}") from error

    return LiveSource(called, heard)


def _blocks(portaudio: Any, index: int, rate: int, called: str) -> Iterator[NDArray[np.float32]]:
    """Yield what a device hears, (t, 1); raises AudioError when nothing comes any more."""
    arrived: queue.Queue[NDArray[np.float32] | None] = queue.Queue(_BACKLOG)

    def take(heard: NDArray[np.float32], *_: object) -> None:
        with suppress(queue.Full):  # PortAudio's thread must never wait
            arrived.put_nowait(heard.copy())

    def end() -> None:
        with suppress(queue.Full):
            arrived.put_nowait(None)

    with portaudio.InputStream(
        rate, round(BLOCK * rate), index, channels=1, dtype="float32", callback=take, finished_callback=end
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
        import sounddevice
    except ModuleNotFoundError as error:
        extra = "`pip install 'ced[live]'`"
        raise AudioError(f"input devices need the package {error.name}, which {extra} brings") from error
    except OSError as error:  # the package is there, the library it speaks to is not
        raise AudioError(f"input devices need the PortAudio library ({error}); {_LIBRARY}") from error
    return sounddevice


def _reason(error: Exception) -> str:
    """Return the first line of what PortAudio says."""
    words = str(error).strip().splitlines()
    if not words or words[0] == "Error querying device -1":
        return "there is none"
    return words[0]
