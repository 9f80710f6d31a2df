"""Tagging what has no end: events are reported when they begin, and when they are over."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from ced.errors import ConfigError
from ced.sound.audio import Channel
from ced.sound.labels import ClassTable
from ced.sound.live import Listening, LiveSource
from ced.tag.events import Event, Merging
from ced.tag.options import TagOptions
from ced.tag.records import Record, Scored, Tags
from ced.tag.tagger import Tagger

LULL = 10.0  # seconds in which a source delivers nothing, after which open events are ended

# Windows that a sound fills leave room within two seconds for the hop, a block and the scoring. Short pauses belong to
# an event: a dog that barks three times is one event.
OPTIONS = TagOptions(window=1.5, hop=0.25, thresholds=0.5, events=True, gap=2.0)


@dataclass(frozen=True)
class LiveReport:
    """News of one event; each begins once and ends once."""

    state: Literal["begin", "end"]
    event: int  # counts from 1, in the order in which they are reported
    time: float  # when it began or ended, in seconds as of time.time()
    piece: Tags  # its times count from the first sound heard; while it goes on, its end is how far that is known

    def to_json(self, source: str, model: str, channel: Channel = "mean") -> dict[str, Any]:
        """Return the report as a value for `json.dumps`: a record with one piece, and what is new about it."""
        piece = Tags(round(self.piece.start, 3), round(self.piece.end, 3), self.piece.tags)  # as the clock's time
        record = Record(source, model, piece.end, (piece,), "events", channel).to_json()
        stamp = datetime.fromtimestamp(self.time).astimezone().isoformat(timespec="milliseconds")
        return {**record, "state": self.state, "event": self.event, "time": stamp}


class LiveEvents:
    """Turns the scored windows of live sound into reports of events that begin and end.

    What ends is what `events` makes of the same windows; the memory needed does not depend on how many there are.

    Args:
        labels: the classes of the model.
        options: thresholds, and how windows are merged into events.

    Raises:
        ConfigError: the options do not fit the classes.
    """

    def __init__(self, labels: ClassTable, options: TagOptions) -> None:
        self._merging = Merging.of(options, labels)
        self._told: dict[int, tuple[int, float]] = {}  # events in progress, by class: number, when they began
        self._count = 0
        self._zero = 0.0  # clock time of second 0 for the last window; a stream that stalls moves it

    def add(self, scored: Scored, clock: float) -> Iterator[LiveReport]:
        """Add a window whose last sample came at `clock` (seconds as of time.time()); yield what is new."""
        yield from self._over(self._merging.add(scored))  # these are events of the windows before
        self._zero = clock - scored.end
        for event in self._merging.begun():
            yield self._begin(event)

    def pass_to(self, time: float) -> Iterator[LiveReport]:
        """Yield the end of events that nothing from `time` on (seconds of sound) can belong to."""
        yield from self._over(self._merging.pass_to(time))

    def finish(self) -> Iterator[LiveReport]:
        """Yield the end of all events."""
        yield from self._over(self._merging.finish())

    def _begin(self, event: Event) -> LiveReport:
        self._count += 1
        self._told[event.index] = self._count, self._zero + event.onset
        return LiveReport("begin", *self._told[event.index], event.piece(self._merging.selection))

    def _over(self, events: list[Event]) -> Iterator[LiveReport]:
        for event in sorted(events):
            if event.index not in self._told:  # only now it is sure to be long enough
                yield self._begin(event)
            number, began = self._told.pop(event.index)
            yield LiveReport("end", number, began + event.offset - event.onset, event.piece(self._merging.selection))


class Listener:
    """Listens to a live source and reports events.

    Args:
        tagger: who scores, one window after the other.
        source: what is listened to.
        options: windows, thresholds, and how windows are merged into events.

    Attributes:
        stopped: set to True, from anywhere, it ends `reports` within a fraction of a second.

    Raises:
        ConfigError: the options are not of events, or do not fit the model.
    """

    def __init__(self, tagger: Tagger, source: LiveSource, options: TagOptions = OPTIONS) -> None:
        if not options.events or options.columns:
            raise ConfigError("live tagging reports events of whole windows; set events, and leave out columns")
        tagger.windows.check(options)
        self._windows, self._options = tagger.windows, options
        self._events = LiveEvents(tagger.labels, options)
        self._listening = Listening(source, options.window, options.step)
        self.stopped = False

    @property
    def left_out(self) -> int:
        """How many windows were not scored, because others had come by then."""
        return self._listening.left_out

    def reports(self) -> Iterator[LiveReport]:
        """Listen, and yield what is heard, until the source ends or `stopped` is set; what goes on then ends there.

        Raises:
            AudioError: the source could not be opened for the first time, or one that is not endless failed.
            ConfigError: it was called before; the times of a listener are those of one listening.
        """
        with self._listening as listening:
            last, seen = 0.0, time.monotonic()  # where the last window ended, and when it was seen
            while not self.stopped and not listening.ended:
                arrival = listening.take()
                if arrival is not None:
                    last, seen = arrival.window.end, time.monotonic()
                    for scored in self._windows.score(arrival.window, self._options):
                        yield from self._events.add(scored, arrival.clock)
                else:
                    yield from self._events.pass_to(last + time.monotonic() - seen - LULL)
            yield from self._events.finish()
