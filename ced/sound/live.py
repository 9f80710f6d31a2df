"""Listening to a live source: windows in real time, outages bridged by reopening, nothing kept for later."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError
from ced.sound.audio import SAMPLE_RATE, Window, check_windows, cut_windows
from ced.sound.live_sources import LiveSource

_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before each attempt to reopen a source; the last one repeats
_WAITING = 1.0  # seconds of windows that may wait to be scored; further ones replace the oldest
_STEADY = 10.0  # seconds of sound after which a source counts as restored, and the delays start at the shortest again
_NOTE_EVERY = 60.0  # seconds between two warnings about dropped windows
_POLL = 0.2  # seconds; how soon a listener notices that it was stopped

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Arrival:
    """A window, and when its last sample arrived."""

    window: Window  # its times count from the first sample of the source, outages included
    clock: float  # seconds, as of time.time()


class Listening:
    """Windows of a live source as they arrive, read by a thread of its own.

    A lost source is reopened after 1, 2, 4, ... at most 30 s; the times of later windows include the outage. At most a
    second of windows waits to be taken. If they are taken too slowly, the oldest are dropped, so that results are never
    late and memory never grows.

    Args:
        source: the source.
        length: seconds a window.
        hop: seconds from one window to the next.

    Attributes:
        left_out: how many windows were dropped.

    Raises:
        ConfigError: `length` or `hop` is shorter than a sample, or it is entered for a second time.
    """

    def __init__(self, source: LiveSource, length: float, hop: float) -> None:
        check_windows(length, hop)
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
            raise ConfigError(f"this listener of {self._source.name} was used before; make a new one each time")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(_POLL)  # a silent server may block it longer; it is a daemon, so it ends with the program

    @property
    def ended(self) -> bool:
        """Whether there will be no further window."""
        with self._change:
            return self._ended and not self._waiting and self._fault is None

    def take(self) -> Arrival | None:
        """Return the oldest waiting window, after a short wait for one; None: none has arrived, or the source ended.

        Raises:
            AudioError: the first attempt to open the source failed, or a source that is not endless failed.
        """
        with self._change:
            if not self._waiting and not self._ended:
                self._change.wait(_POLL)
            if self._waiting:
                return self._waiting.popleft()
            if self._fault is not None:
                raise self._fault
            return None

    def _listen(self) -> None:
        try:
            for arrival in _Course(self._source, self._closed).arrivals(self._length, self._hop):
                self._put(arrival)
        except Exception as error:  # raised again by `take`, in the caller's thread
            self._fault = error
        with self._change:
            self._ended = True
            self._change.notify()

    def _put(self, arrival: Arrival) -> None:
        with self._change:
            full = len(self._waiting) == self._waiting.maxlen
            self.left_out += full
            self._waiting.append(arrival)  # a full deque drops the oldest
            self._change.notify()
        if full and time.monotonic() - self._noted >= _NOTE_EVERY:
            self._noted = time.monotonic()
            logger.warning(
                "sound arrives faster than it is scored: %d windows dropped so far; a longer hop or a smaller model"
                " would help",
                self.left_out,
            )


class _Course:
    """The history of a source: when it was open, how much sound it gave, and how often opening it failed.

    Its clocks are as of time.monotonic(). A session is one time that the source is open.
    """

    def __init__(self, source: LiveSource, closed: threading.Event) -> None:
        self._source, self._closed = source, closed
        self._begin: float | None = None  # when the first sample of all arrived
        self._last = 0.0  # when the last one arrived
        self._start = 0.0  # seconds from the first sample of all to that of this session
        self._samples = 0  # of this session
        self._failures = 0  # since the last session of at least `_STEADY` seconds

    def arrivals(self, length: float, hop: float) -> Iterator[Arrival]:
        """Yield the windows of all sessions, until the source ends, fails for good, or is closed.

        Times count from the first sample of all. They follow the samples, and jump forward only at an outage. A window
        that is cut off by a fault is dropped: its sound may be long past when the fault is known.
        """
        while not self._closed.is_set():
            fault = AudioError(f"{self._source.name} has ended")
            try:
                for window in cut_windows(self._blocks(), length, hop):
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
        """Open the source and yield its sound, until it is closed."""
        self._start += self._samples / SAMPLE_RATE  # where the last session ended; an outage moves it on
        self._samples = 0
        for block in self._source.open():
            if self._closed.is_set():
                return
            now = time.monotonic()
            if not self._samples:
                self._begin_session(now - len(block) / SAMPLE_RATE)
            self._samples += len(block)
            self._last = now
            yield block

    def _begin_session(self, first: float) -> None:
        """Begin a session whose first sample arrived at `first`."""
        if self._begin is None:
            self._begin = first
            logger.info("listening to %s", self._source.name)
        else:
            self._start = max(self._start, first - self._begin)
            logger.warning("%s is back after %.0f s", self._source.name, first - self._last)

    def _wait(self, fault: AudioError) -> None:
        """Wait before the source is reopened, longer after each failure."""
        if self._samples:
            logger.warning("%s; reopening it until it is back", fault)
        if self._samples >= _STEADY * SAMPLE_RATE:
            self._failures = 0
        delay = _DELAYS[min(self._failures, len(_DELAYS) - 1)]
        self._failures += 1
        self._closed.wait(delay)
