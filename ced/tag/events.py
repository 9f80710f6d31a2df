"""Events: neighbouring windows in which a class is heard become one piece with an onset and an offset."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError
from ced.tag.records import Scored, Tags
from ced.tag.select import Selection

SAME_INSTANT = 1e-6  # seconds; times that differ by less are equal but for rounding


def events(
    scored: Iterable[Scored], selection: Selection, *, release: float = 0.5, gap: float = 0.0, shortest: float = 0.0
) -> Iterator[Tags]:
    """Merge scored windows into events: pieces with one tag, by onset, then by class.

    A class's event begins with a window that reaches its threshold and goes on through windows next to each other that
    stay at or above `release` times the threshold. Its probability is the highest of its windows. `top_k` of the
    selection plays no part: a threshold is what makes an event.

    Where windows overlap, each speaks for its middle: two neighbours meet half-way through their overlap. So events of
    one class never overlap, and without overlap they begin and end with their windows.

    An event comes out as soon as none that began earlier is still going on; what is held until then is one event a
    class and the events that wait, never windows.

    Args:
        scored: windows in order of time.
        selection: the classes and their thresholds.
        release: part of the threshold that keeps an event going, above 0, at most 1.
        gap: seconds; events of one class that are no further apart become one.
        shortest: seconds; shorter events are dropped, after merging.

    Raises:
        ConfigError: the selection has no thresholds, an argument is out of range, or a window begins or ends before the
            one ahead of it (when the iteration comes to it).
    """
    if selection.thresholds is None:
        raise ConfigError("events need a threshold, one for all classes or one for each; the selection has none")
    if not 0 < release <= 1:
        raise ConfigError(f"release is {release}; it must be above 0 and at most 1")
    for name, seconds in (("gap", gap), ("shortest", shortest)):
        if not seconds >= 0:
            raise ConfigError(f"{name} is {seconds}; it must be 0 seconds or more")
    return _events(scored, selection, release, gap, shortest)


def _events(
    scored: Iterable[Scored], selection: Selection, release: float, gap: float, shortest: float
) -> Iterator[Tags]:
    tracks = _Tracks(len(selection.labels))
    waiting: list[_Event] = []  # a heap: ended events that one with an earlier onset may still come before
    for span in _spans(scored):
        for event in tracks.ended(span.start - gap):
            heapq.heappush(waiting, event)
        if span.scored.silent:
            tracks.pause()
        else:
            probs = span.scored.probs
            tracks.add(span, selection.probs(probs), selection.reached(probs), selection.reached(probs, release))
        first = tracks.first()  # what is not begun yet begins after all that have ended
        while waiting and waiting[0] < first:
            yield from _long_enough(heapq.heappop(waiting), selection, shortest)
    for event in sorted((*waiting, *tracks.ended(np.inf))):
        yield from _long_enough(event, selection, shortest)


@dataclass(frozen=True, order=True)
class _Event:
    onset: float  # seconds
    index: int  # of the selection's labels
    offset: float
    peak: float  # the highest probability


def _long_enough(event: _Event, selection: Selection, shortest: float) -> Iterator[Tags]:
    if event.offset - event.onset >= shortest - SAME_INSTANT:
        yield Tags(event.onset, event.offset, (selection.tag(event.index, event.peak),))


@dataclass(frozen=True, eq=False)
class _Span:
    """The stretch of time that a window speaks for."""

    start: float  # seconds
    end: float
    follows: bool  # nothing lies between it and the span before
    scored: Scored


def _spans(scored: Iterable[Scored]) -> Iterator[_Span]:
    """Give each window its stretch, as soon as the window behind it is there."""
    last: Scored | None = None
    start, follows = 0.0, False
    for window in scored:
        if last is None:
            start = window.start
        else:
            if window.start <= last.start or window.end < last.end:
                raise ConfigError(
                    f"a window of {window.start} to {window.end} s comes behind one of {last.start} to {last.end} s;"
                    " they must come in order of time"
                )
            overlap = max(0.0, last.end - window.start)
            yield _Span(start, last.end - overlap / 2, follows, last)
            start, follows = window.start + overlap / 2, window.start - last.end <= SAME_INSTANT
        last = window
    if last is not None:
        yield _Span(start, last.end, follows, last)


class _Tracks:
    """The event that each class is in, if any, until it has ended for good; arrays are (c')."""

    def __init__(self, count: int) -> None:
        self._there = np.zeros(count, np.bool_)  # whether there is one
        self._going = np.zeros(count, np.bool_)  # whether the last span belongs to it
        self._onset = np.zeros(count)
        self._offset = np.zeros(count)
        self._peak = np.zeros(count, np.float32)

    def ended(self, time: float) -> list[_Event]:
        """Let go of the events that end before `time`, and return them."""
        gone = np.flatnonzero(self._there & (self._offset < time - SAME_INSTANT))
        self._there[gone] = False
        return [
            _Event(float(self._onset[index]), int(index), float(self._offset[index]), float(self._peak[index]))
            for index in gone
        ]

    def add(self, span: _Span, probs: NDArray[np.float32], reached: NDArray[np.bool_], held: NDArray[np.bool_]) -> None:
        """Let the span begin events, join those that are close enough to be still there, or carry them on."""
        self._going = reached | (self._going & held) if span.follows else reached
        fresh = self._going & ~self._there
        self._onset[fresh] = span.start
        self._peak[fresh] = 0.0
        self._there |= fresh
        self._offset[self._going] = span.end
        np.maximum(self._peak, probs, out=self._peak, where=self._going)

    def pause(self) -> None:
        """Let a span pass in which nothing is heard, whatever the thresholds."""
        self._going[:] = False

    def first(self) -> _Event:
        """Return the earliest event that is still there; when there is none, one after all others."""
        there = np.flatnonzero(self._there)
        if not len(there):
            return _Event(np.inf, 0, np.inf, 0.0)
        index = there[np.argmin(self._onset[there])]  # the lowest index of those that begin first
        return _Event(float(self._onset[index]), int(index), -np.inf, 0.0)
