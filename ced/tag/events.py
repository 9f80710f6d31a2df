"""Events: neighbouring windows in which a class is heard become one piece with an onset and an offset."""

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
    class and the events that wait, never windows. `Merging` tells of events as they begin and end.

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
    return _events(scored, OrderedEvents(Merging(selection, release=release, gap=gap, shortest=shortest)))


def _events(scored: Iterable[Scored], ordered: "OrderedEvents") -> Iterator[Tags]:
    for window in scored:
        yield from ordered.add(window)
    yield from ordered.finish()


class OrderedEvents:
    """Events in the order of their onset, then of their class, for callers that have one window at a time.

    An event comes out as soon as no earlier one can follow.
    """

    def __init__(self, merging: "Merging") -> None:
        self._selection, self._merging = merging.selection, merging
        self._waiting: list[Event] = []  # a heap: events that ended, but that one with an earlier onset may precede

    def add(self, window: Scored) -> list[Tags]:
        """Add a window; return the events that are final now.

        Raises:
            ConfigError: the window begins or ends before the previous one.
        """
        for event in self._merging.add(window):
            heapq.heappush(self._waiting, event)
        first, final = self._merging.first(), []  # what has not begun yet begins after all that have ended
        while self._waiting and self._waiting[0] < first:
            final.append(heapq.heappop(self._waiting).piece(self._selection))
        return final

    def finish(self) -> list[Tags]:
        """End all events that are still going on; return the rest."""
        rest = sorted((*self._waiting, *self._merging.finish()))
        self._waiting = []
        return [event.piece(self._selection) for event in rest]


@dataclass(frozen=True, order=True)
class Event:
    """A stretch of time in which a class is heard."""

    onset: float  # seconds
    index: int  # of the selection's labels
    offset: float
    peak: float  # the highest probability

    def piece(self, selection: Selection) -> Tags:
        """Return the event as a piece with one tag."""
        return Tags(self.onset, self.offset, (selection.tag(self.index, self.peak),))


class Merging:
    """Windows become events one after the other, by the rules of `events`; what is held is one event a class.

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
        self._there = np.zeros(count, np.bool_)  # whether the class is in an event, until that has ended for good
        self._going = np.zeros(count, np.bool_)  # whether the last window belongs to it
        self._told = np.zeros(count, np.bool_)  # whether `begun` has told of it
        self._onset = np.zeros(count)
        self._offset = np.zeros(count)  # of those that go on: where the last window ends
        self._peak = np.zeros(count, np.float32)

    @classmethod
    def of(cls, options: TagOptions, labels: ClassTable) -> "Merging":
        """Return what merges the windows of a model with these classes, as the options say.

        Raises:
            ConfigError: the options do not fit the classes.
        """
        return cls(options.selection(labels), release=options.release, gap=options.gap, shortest=options.shortest)

    def add(self, window: Scored) -> list[Event]:
        """Let a window begin events, join those that are close enough to be still there, or carry them on.

        Returns:
            the events that are over, as nothing from this window on can belong to them.

        Raises:
            ConfigError: the window begins or ends before the one ahead of it.
        """
        start, follows = self._meet(window)
        over = self.pass_to(start)
        if window.silent:
            self._going[:] = False
            return over
        reached = self.selection.reached(window.probs)
        if follows:
            reached |= self._going & self.selection.reached(window.probs, self._release)
        self._going = reached
        fresh = self._going & ~self._there
        self._onset[fresh] = start
        self._peak[fresh] = 0.0
        self._told[fresh] = False
        self._there |= fresh
        self._offset[self._going] = window.end
        np.maximum(self._peak, self.selection.probs(window.probs), out=self._peak, where=self._going)
        return over

    def _meet(self, window: Scored) -> tuple[float, bool]:
        """Part the window from the one before; return when its own time starts, and whether nothing lies between."""
        last, self._last = self._last, window
        if last is None:
            return window.start, False
        if window.start <= last.start or window.end < last.end:
            raise ConfigError(
                f"a window of {window.start} to {window.end} s comes behind one of {last.start} to {last.end} s;"
                " they must come in order of time"
            )
        overlap = max(0.0, last.end - window.start)
        self._offset[self._going] = last.end - overlap / 2
        return window.start + overlap / 2, window.start - last.end <= SAME_INSTANT

    def begun(self) -> list[Event]:
        """Return the events that nobody was told of yet, up to now: each once, when it is sure to be long enough."""
        if self._last is None or not (self._there & ~self._told).any():
            return []
        # How much of the last window the next one will take is not known yet; its first half is safe.
        sure = np.minimum(self._offset, (self._last.start + self._last.end) / 2)
        new = self._there & ~self._told & self._is_long(self._onset, sure)
        self._told |= new
        return [self._event(index) for index in np.flatnonzero(new)]

    def pass_to(self, time: float) -> list[Event]:
        """Let go of the events that nothing from `time` on (seconds) can belong to; return those that are long enough.

        A window adds this by itself; it is for times without any.
        """
        gone = self._there & (self._offset < time - self._gap - SAME_INSTANT)
        self._there &= ~gone
        self._going &= ~gone
        return [self._event(index) for index in np.flatnonzero(gone & self._is_long(self._onset, self._offset))]

    def finish(self) -> list[Event]:
        """Let go of all events; return those that are long enough."""
        return self.pass_to(np.inf)

    def first(self) -> Event:
        """Return the earliest event that is still there; when there is none, one after all others."""
        there = np.flatnonzero(self._there)
        if not len(there):
            return Event(np.inf, 0, np.inf, 0.0)
        index = there[np.argmin(self._onset[there])]  # the lowest index of those that begin first
        return Event(float(self._onset[index]), int(index), -np.inf, 0.0)

    def _is_long(self, onset: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = offset - onset >= self._shortest - SAME_INSTANT
        return found

    def _event(self, index: np.intp) -> Event:
        return Event(float(self._onset[index]), int(index), float(self._offset[index]), float(self._peak[index]))
