"""Events: merge neighbouring windows in which a class reaches its threshold (hysteresis), with onset and offset."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError
from ced.sound.labels import ClassTable
from ced.tag.options import TagOptions
from ced.tag.records import Scored, Tags
from ced.tag.select import Selection

SAME_INSTANT = 1e-6  # seconds; times that differ by less are equal except for rounding


def events(
    scored: Iterable[Scored], selection: Selection, *, release: float = 0.5, gap: float = 0.0, shortest: float = 0.0
) -> Iterator[Tags]:
    """Merge scored windows into events: pieces with one tag, in order of onset, then of class.

    An event of a class begins with a window that reaches the threshold and continues through adjacent windows that
    reach `release` times the threshold. Its probability is the highest of its windows. `top_k` of the selection does
    not apply.

    If windows overlap, the time of each ends in the middle of the overlap with its neighbour. So events of one class
    never overlap, and without overlap they begin and end with their windows.

    An event is yielded as soon as no event with an earlier onset is open. Memory holds one open event for each class
    and the finished events that wait, but no windows. `Merging` reports events as they begin and end.

    Args:
        scored: windows in order of time.
        selection: the classes and their thresholds.
        release: an event continues above this fraction of its threshold; above 0, at most 1.
        gap: merge events of one class at most this many seconds apart.
        shortest: drop events shorter than this many seconds, after merging.

    Raises:
        ConfigError: the selection has no thresholds, an argument is out of range, or (while iterating) a window begins
            or ends before the previous one.
    """
    return _events(scored, OrderedEvents(Merging(selection, release=release, gap=gap, shortest=shortest)))


def _events(scored: Iterable[Scored], ordered: "OrderedEvents") -> Iterator[Tags]:
    for window in scored:
        yield from ordered.add(window)
    yield from ordered.finish()


class OrderedEvents:
    """Events in order of onset, then of class, for callers that have one window at a time.

    An event is returned as soon as no earlier one can follow.
    """

    def __init__(self, merging: "Merging") -> None:
        self._selection, self._merging = merging.selection, merging
        self._waiting: list[Event] = []  # a heap of finished events that one with an earlier onset may precede

    def add(self, window: Scored) -> list[Tags]:
        """Add a window; return the events that are final now.

        Raises:
            ConfigError: the window begins or ends before the previous one.
        """
        for event in self._merging.add(window):
            heapq.heappush(self._waiting, event)
        first, final = self._merging.first(), []  # later events begin after all finished ones
        while self._waiting and self._waiting[0] < first:
            final.append(heapq.heappop(self._waiting).piece(self._selection))
        return final

    def finish(self) -> list[Tags]:
        """End all open events; return the remaining ones."""
        rest = sorted((*self._waiting, *self._merging.finish()))
        self._waiting = []
        return [event.piece(self._selection) for event in rest]


@dataclass(frozen=True, order=True)
class Event:
    """The time span of an event of one class."""

    onset: float  # seconds
    index: int  # of the selection's labels
    offset: float
    peak: float  # the highest probability

    def piece(self, selection: Selection) -> Tags:
        """Return the event as a piece with one tag."""
        return Tags(self.onset, self.offset, (selection.tag(self.index, self.peak),))


class Merging:
    """Merges windows into events one by one, by the rules of `events`; holds one open event for each class.

    Args:
        selection, release, gap, shortest: as for `events`.

    Raises:
        ConfigError: the selection has no thresholds, or an argument is out of range.
    """

    def __init__(self, selection: Selection, *, release: float = 0.5, gap: float = 0.0, shortest: float = 0.0) -> None:
        if selection.thresholds is None:
            raise ConfigError("events need a threshold, one for all classes or one for each; the selection has none")
        if not 0 < release <= 1:
            raise ConfigError(f"release is {release}; it must be above 0 and at most 1")
        for name, seconds in (("gap", gap), ("shortest", shortest)):
            if not seconds >= 0:
                raise ConfigError(f"{name} is {seconds}; it must be 0 seconds or more")
        self.selection, self._release, self._gap, self._shortest = selection, release, gap, shortest
        self._last: Scored | None = None
        count = len(selection.labels)  # c'
        self._open = np.zeros(count, np.bool_)  # whether the class has an open event
        self._active = np.zeros(count, np.bool_)  # whether the last window belongs to that event
        self._reported = np.zeros(count, np.bool_)  # whether `begun` has returned it
        self._onset = np.zeros(count)
        self._offset = np.zeros(count)  # of events that continue: the end of the last window
        self._peak = np.zeros(count, np.float32)

    @classmethod
    def of(cls, options: TagOptions, labels: ClassTable) -> "Merging":
        """Return what merges the windows of a model with these classes, as the options say.

        Raises:
            ConfigError: the options do not fit the classes.
        """
        return cls(options.selection(labels), release=options.release, gap=options.gap, shortest=options.shortest)

    def add(self, window: Scored) -> list[Event]:
        """Add a window: it begins events, continues them, or joins one that ended within the gap.

        Returns:
            the events that have ended for good: no window from this one on can belong to them.

        Raises:
            ConfigError: the window begins or ends before the previous one.
        """
        start, follows = self._meet(window)
        over = self.pass_to(start)
        if window.silent:
            self._active[:] = False
            return over
        reached = self.selection.reached(window.probs)
        if follows:
            reached |= self._active & self.selection.reached(window.probs, self._release)
        self._active = reached
        fresh = self._active & ~self._open
        self._onset[fresh] = start
        self._peak[fresh] = 0.0
        self._reported[fresh] = False
        self._open |= fresh
        self._offset[self._active] = window.end
        np.maximum(self._peak, self.selection.probs(window.probs), out=self._peak, where=self._active)
        return over

    def _meet(self, window: Scored) -> tuple[float, bool]:
        """Split the overlap with the previous window; return where this one's time begins, and whether they adjoin."""
        last, self._last = self._last, window
        if last is None:
            return window.start, False
        if window.start <= last.start or window.end < last.end:
            raise ConfigError(
                f"a window of {window.start} to {window.end} s follows one of {last.start} to {last.end} s;"
                " windows must be in order of time"
            )
        overlap = max(0.0, last.end - window.start)
        self._offset[self._active] = last.end - overlap / 2
        return window.start + overlap / 2, window.start - last.end <= SAME_INSTANT

    def begun(self) -> list[Event]:
        """Return the open events that were not returned before, each once it is certain to be long enough."""
        if self._last is None or not (self._open & ~self._reported).any():
            return []
        # The next window may take up to half of the last one.
        sure = np.minimum(self._offset, (self._last.start + self._last.end) / 2)
        new = self._open & ~self._reported & self._is_long(self._onset, sure)
        self._reported |= new
        return [self._event(index) for index in np.flatnonzero(new)]

    def pass_to(self, time: float) -> list[Event]:
        """End the events that no window from `time` on (seconds) can belong to; return those that are long enough.

        `add` does this itself; it is for stretches without windows.
        """
        gone = self._open & (self._offset < time - self._gap - SAME_INSTANT)
        self._open &= ~gone
        self._active &= ~gone
        return [self._event(index) for index in np.flatnonzero(gone & self._is_long(self._onset, self._offset))]

    def finish(self) -> list[Event]:
        """End all events; return those that are long enough."""
        return self.pass_to(np.inf)

    def first(self) -> Event:
        """Return the earliest open event; without one, an event after all others."""
        found = np.flatnonzero(self._open)
        if not len(found):
            return Event(np.inf, 0, np.inf, 0.0)
        index = found[np.argmin(self._onset[found])]  # the lowest index among those that begin first
        return Event(float(self._onset[index]), int(index), -np.inf, 0.0)

    def _is_long(self, onset: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = offset - onset >= self._shortest - SAME_INSTANT
        return found

    def _event(self, index: np.intp) -> Event:
        return Event(float(self._onset[index]), int(index), float(self._offset[index]), float(self._peak[index]))
