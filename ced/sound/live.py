"""Sound that has no end: a source that is listened to, opened again when it is lost, and never kept."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError
from ced.sound import audio
from ced.sound.audio import SAMPLE_RATE, Channel, Mix, Window, check_channel
from ced.sound.decode import checked
from ced.sound.ffmpeg import is_rtsp, open_address, open_rtsp
from ced.sound.reading import Block, Reading
from ced.sound.web import is_address, without_password

BLOCK = 0.1  # seconds that are read at a time
_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before each further attempt to open a source; the last is kept
_WAITING = 1.0  # seconds of windows that may wait to be scored; what comes behind them drives the oldest out
_STEADY = 10.0  # seconds of sound after which a source counts as restored, and delays start at the shortest again
_HASTE = 1.25  # how much faster than it sounds a stream is heard that lies behind
_NOTE_EVERY = 60.0  # seconds between two notes of windows left out
_GLANCE = 0.2  # seconds; how soon a listener sees that it was stopped

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveSource:
    """A place where sound comes from.

    Attributes:
        name: what messages call it.
        open: begins to yield what is heard from now on, (t,) float32 at 16 kHz; raises AudioError if there is nothing
            to hear, or no longer.
        endless: it is opened again when it ends or fails; else its end is the end.
    """

    name: str
    open: Callable[[], Iterator[NDArray[np.float32]]]
    endless: bool = True


def address(url: str, channel: Channel = "mean") -> LiveSource:
    """Return the stream behind an http(s) or rtsp address, decoded as it arrives.

    What a server sends in advance is read hardly faster than it sounds, as by a player; where that ends, so does the
    delay. A password in the address is not a part of the name.

    Args:
        url: the address.
        channel: as for `ced.sound.audio.open_sound`.

    Raises:
        ConfigError: it is not such an address, or no such channel.
    """
    if not (is_address(url) or is_rtsp(url)):
        raise ConfigError(f"{url} is not an http(s) or rtsp address; sounds in files are for `ced tag`")
    check_channel(channel)
    return LiveSource(without_password(url), lambda: paced(_received(url, channel)))


def blocks(found: Iterable[NDArray[Any]], rate: int, name: str = "<blocks>", channel: Channel = "mean") -> LiveSource:
    """Return a source of blocks (t, channels) of any integer or float type, which can be listened to once.

    Whoever listens gets an AudioError at a block of another shape or type, or one that `ced.sound.audio.load` would
    refuse.

    Raises:
        ConfigError: `channel` is not one that `ced.sound.audio.open_sound` accepts.
    """
    check_channel(channel)
    return LiveSource(name, lambda: waves(_shaped(found, name), rate, name, channel), endless=False)


def _shaped(found: Iterable[NDArray[Any]], name: str) -> Iterator[NDArray[Any]]:
    for block in found:
        if block.ndim != 2 or not block.shape[1] or block.dtype.kind not in "iuf":
            what = f"a block of shape {block.shape} and type {block.dtype}"
            raise AudioError(f"{name} gives {what}; expected (t, channels) of integers or floats")
        yield block


def waves(
    found: Iterable[NDArray[Any]], rate: int, name: str, channel: Channel = "mean"
) -> Iterator[NDArray[np.float32]]:
    """Bring blocks (t, channels) to what models take, (t,) at 16 kHz.

    Raises:
        AudioError: a sample is not a number or far beyond [-1, 1], or there is no such channel.
    """
    read = (Block(samples, rate) for samples in found)
    return audio.resampled(checked(read, Reading(name)), Mix(channel, name))


@dataclass(frozen=True, eq=False)
class Arrival:
    """A window, and when its last sample came."""

    window: Window  # its times count from the beginning of the listening, outages included
    clock: float  # seconds, as of time.time()


class Listening:
    """Windows of a live source as they come, read by a thread of their own.

    A source that is lost is opened again, after 1, 2, 4, ... at most 30 s; the windows behind an outage are later by as
    long as it took. At most a second of windows wait to be taken: if they are taken too slowly, the oldest are left
    out, so what is heard is never old and memory never grows.

    Args:
        source: what is listened to.
        length: seconds a window.
        hop: seconds from one window to the next.

    Attributes:
        left_out: how many windows nobody took in time.

    Raises:
        ConfigError: `length` or `hop` is shorter than a sample, or it is entered for a second time.
    """

    def __init__(self, source: LiveSource, length: float, hop: float) -> None:
        audio.cut((), length, hop)  # refuses now what would be refused in the thread
        self.left_out = 0
        self._source, self._length, self._hop = source, length, hop
        self._waiting: deque[Arrival] = deque(maxlen=max(2, round(_WAITING / hop)))
        self._change = threading.Condition()
        self._closed = threading.Event()
        self._ended = False
        self._fault: Exception | None = None
        self._noted = -_NOTE_EVERY
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)

    def __enter__(self) -> "Listening":
        if self._thread.ident is not None:
            raise ConfigError(f"{self._source.name} was listened to before; each time needs a listener of its own")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(_GLANCE)  # a server that is silent holds it longer; it ends with the program then

    @property
    def ended(self) -> bool:
        """Whether there will be no further window."""
        with self._change:
            return self._ended and not self._waiting and self._fault is None

    def take(self) -> Arrival | None:
        """Return the oldest window that waits, waiting a moment for one; None: there is none yet, or no more.

        Raises:
            AudioError: the source could not be opened for the first time, or one that is not endless failed.
        """
        with self._change:
            if not self._waiting and not self._ended:
                self._change.wait(_GLANCE)
            if self._waiting:
                return self._waiting.popleft()
            if self._fault is not None:
                raise self._fault
            return None

    def _listen(self) -> None:
        try:
            for arrival in _Course(self._source, self._closed).arrivals(self._length, self._hop):
                self._put(arrival)
        except Exception as error:  # raised again by `take`, where somebody sees it
            self._fault = error
        with self._change:
            self._ended = True
            self._change.notify()

    def _put(self, arrival: Arrival) -> None:
        with self._change:
            full = len(self._waiting) == self._waiting.maxlen
            self.left_out += full
            self._waiting.append(arrival)  # a full deque lets go of the oldest
            self._change.notify()
        if full and time.monotonic() - self._noted >= _NOTE_EVERY:
            self._noted = time.monotonic()
            _log.warning(
                "sound comes faster than it is scored: %d windows left out so far; a longer hop or a smaller model"
                " would help",
                self.left_out,
            )


class _Course:
    """What became of a source so far: when it was heard, how far that came, and how often it was opened in vain.

    Its clocks are as of time.monotonic().
    """

    def __init__(self, source: LiveSource, closed: threading.Event) -> None:
        self._source, self._closed = source, closed
        self._begin: float | None = None  # when the first sample of all came
        self._last = 0.0  # when the last one came
        self._start = 0.0  # seconds from the first sample of all to that of this visit: one time that it is open
        self._samples = 0  # heard in this visit
        self._failures = 0  # how often it was lost or not there, since it was last heard for long

    def arrivals(self, length: float, hop: float) -> Iterator[Arrival]:
        """Yield the windows of all times that the source is open, until it ends, fails for good, or is closed.

        Their times count from the first sample. They are those of the samples, and leap ahead at an outage only. A
        window that a fault cuts off is dropped: its sound may be long over when the fault is known.
        """
        while not self._closed.is_set():
            fault = AudioError(f"{self._source.name} has ended")
            try:
                for window in audio.cut(self._blocks(), length, hop):
                    times = self._start + window.start, self._start + window.end
                    yield Arrival(Window(*times, window.wave), time.time() - (time.monotonic() - self._last))
                if not self._source.endless:
                    return
            except AudioError as error:
                fault = error
            if self._closed.is_set():
                return
            if self._begin is None or not self._source.endless:
                raise fault
            self._wait(fault)

    def _blocks(self) -> Iterator[NDArray[np.float32]]:
        """Open the source and yield what is heard, until it is closed."""
        self._start += self._samples / SAMPLE_RATE  # where the visit before ended; an outage moves it on
        self._samples = 0
        for block in self._source.open():
            if self._closed.is_set():
                return
            now = time.monotonic()
            if not self._samples:
                self._arrive(now - len(block) / SAMPLE_RATE)
            self._samples += len(block)
            self._last = now
            yield block

    def _arrive(self, first: float) -> None:
        """Begin a visit whose first sample came at `first`."""
        if self._begin is None:
            self._begin = first
            _log.info("listening to %s", self._source.name)
        else:
            self._start = max(self._start, first - self._begin)
            _log.warning("%s is back after %.0f s", self._source.name, first - self._last)

    def _wait(self, fault: AudioError) -> None:
        """Wait before the source is opened again, the longer the more often it was in vain."""
        if self._samples:
            _log.warning("%s; opening it again until it is back", fault)
        if self._samples >= _STEADY * SAMPLE_RATE:
            self._failures = 0
        delay = _DELAYS[min(self._failures, len(_DELAYS) - 1)]
        self._failures += 1
        self._closed.wait(delay)


def _received(url: str, channel: Channel) -> Iterator[NDArray[np.float32]]:
    with ExitStack() as stack:
        reading = Reading(without_password(url))
        opened = (open_rtsp if is_rtsp(url) else partial(open_address, live=True))(url, stack, reading)
        # Each packet as it comes: what is joined to blocks would wait for more.
        yield from audio.resampled(checked(opened.blocks(1), reading), Mix(channel, reading.name))
        if reading.broken:
            raise AudioError(reading.warnings[-1] if reading.warnings else reading.cut, reading.name)


def paced(found: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Yield blocks hardly faster than they sound, as servers send what they have in store all at once."""
    due = time.monotonic()
    for block in found:
        time.sleep(max(0.0, due - time.monotonic()))
        due = max(due, time.monotonic()) + len(block) / SAMPLE_RATE / _HASTE
        yield block
