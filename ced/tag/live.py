"""Tag live sound: report events when they begin and when they end."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from ced.errors import ConfigError
from ced.sound.audio import Channel
from ced.sound.labels import ClassTable
from ced.sound.live import Listening
from ced.sound.live_sources import LiveSource
from ced.tag.events import Event, Merging
from ced.tag.options import LIVE, TagOptions
from ced.tag.records import Record, Scored, Tags
from ced.tag.tagger import Tagger

LULL = 10.0  # seconds without sound from a source, after which open events end

OPTIONS = TagOptions(**LIVE)


@dataclass(frozen=True)
class LiveReport:
    """The begin or the end of an event; each event begins once and ends once."""

    state: Literal["begin", "end"]
    event: int  # number of the event, from 1, in order of reporting
    time: float  # when it began or ended, in seconds as of time.time()
    piece: Tags  # times relative to the first sound received; of an event that continues, the end known so far

    def to_json(self, source: str, model: str, channel: Channel = "mean") -> dict[str, Any]:
        """Return the report as a value for `json.dumps`: a record with one piece, then state, number and time."""
        piece = Tags(
            round(self.piece.start, 3), round(self.piece.end, 3), self.piece.tags
        )  # to the millisecond, as the clock time
        record = Record(source, model, piece.end, (piece,), "events", channel).to_json()
        stamp = datetime.fromtimestamp(self.time).astimezone().isoformat(timespec="milliseconds")
        return {**record, "state": self.state, "event": self.event, "time": stamp}


class LiveEvents:
    """Turns the scored windows of live sound into reports of events that begin and end.

    The events are those of `ced.tag.events.events` for the same windows; memory does not grow with their number.

    Args:
        labels: the classes of the model.
        options: thresholds, and how windows are merged into events.

    Raises:
        ConfigError: the options do not fit the classes.
    """

    def __init__(self, labels: ClassTable, options: TagOptions) -> None:
        self._merging = Merging.of(options, labels)
        self._begun: dict[int, tuple[int, float]] = {}  # open events, by class: number, time of begin
        self._count = 0
        self._zero = 0.0  # clock time of second 0 for the last window; moves when a stream stalls

    def add(self, scored: Scored, clock: float) -> Iterator[LiveReport]:
        """Add a window whose last sample arrived at `clock` (seconds as of time.time()); yield new reports."""
        yield from self._over(self._merging.add(scored))  # events of earlier windows
        self._zero = clock - scored.end
        for event in self._merging.begun():
            yield self._begin(event)

    def pass_to(self, time: float) -> Iterator[LiveReport]:
        """Yield the end of events that no window from `time` on (seconds of sound) can belong to."""
        yield from self._over(self._merging.pass_to(time))

    def finish(self) -> Iterator[LiveReport]:
        """Yield the end of all events."""
        yield from self._over(self._merging.finish())

    def _begin(self, event: Event) -> LiveReport:
        self._count += 1
        self._begun[event.index] = self._count, self._zero + event.onset
        return LiveReport("begin", *self._begun[event.index], event.piece(self._merging.selection))

    def _over(self, events: list[Event]) -> Iterator[LiveReport]:
        for event in sorted(events):
            if event.index not in self._begun:  # only now it is certain to be long enough
                yield self._begin(event)
            number, began = self._begun.pop(event.index)
            yield LiveReport("end", number, began + event.offset - event.onset, event.piece(self._merging.selection))


class Listener:
    """Listens to a live source and reports events.

    Args:
        tagger: scores the windows one by one.
        source: the live source.
        options: windows, thresholds, and how windows are merged into events.

    Attributes:
        stopped: set it to True, from any thread, to end `reports` within a fraction of a second.

    Raises:
        ConfigError: the options do not ask for events, or do not fit the model.
    """

    def __init__(self, tagger: Tagger, source: LiveSource, options: TagOptions = OPTIONS) -> None:
        if not options.events or options.columns:
            raise ConfigError("live tagging reports events of whole windows; set events, and do not set columns")
        tagger.windows.check(options)
        self._windows, self._options = tagger.windows, options
        self._events = LiveEvents(tagger.labels, options)
        self._listening = Listening(source, options.window, options.step)
        self.stopped = False

    @property
    def left_out(self) -> int:
        """The number of windows that were not scored, because newer ones had arrived."""
        return self._listening.left_out

    def reports(self) -> Iterator[LiveReport]:
        """Listen and yield reports until the source ends or `stopped` is set; open events end there.

        Raises:
            AudioError: the source could not be opened for the first time, or one that is not endless failed.
            ConfigError: it was called before; the times of a listener are those of a single run.
        """
        with self._listening as listening:
            last, seen = 0.0, time.monotonic()  # end of the last window, and when it was taken
            while not self.stopped and not listening.ended:
                arrival = listening.take()
                if arrival is not None:
                    last, seen = arrival.window.end, time.monotonic()
                    for scored in self._windows.score(arrival.window, self._options):
                        yield from self._events.add(scored, arrival.clock)
                else:
                    yield from self._events.pass_to(last + time.monotonic() - seen - LULL)
            yield from self._events.finish()
