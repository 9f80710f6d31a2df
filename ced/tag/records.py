"""The results of tagging: scores and tags of windows, embeddings, and the record of a sound."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError
from ced.sound.audio import Channel
from ced.tag.clock import iso_time

T = TypeVar("T")

FORMAT_VERSION = 1  # of the record, and so of all outputs
CLOCK_KEYS = ("start_time", "end_time")  # of windows and events, with a clock: ISO 8601


@dataclass(frozen=True, eq=False)
class Scored:
    """The scores of a window."""

    start: float  # seconds
    end: float
    probs: NDArray[np.float32]  # (c,)
    silent: bool = False  # not scored: its probabilities are 0


@dataclass(frozen=True, eq=False)
class Embedding:
    """The embeddings of the windows of a sound."""

    starts: NDArray[np.float64]  # (w,) seconds
    ends: NDArray[np.float64]
    vectors: NDArray[np.float32]  # (w, d)
    channel: str | int = "mean"
    complete: bool = True  # False: the file is truncated

    @property
    def seconds(self) -> float:
        """The length of the sound."""
        return float(self.ends[-1])

    @property
    def clip(self) -> NDArray[np.float32]:
        """The embedding of the sound as a whole, (d,): the mean of its windows, weighted by their length."""
        mean: NDArray[np.float32] = np.average(self.vectors, axis=0, weights=self.ends - self.starts).astype(np.float32)
        return mean


@dataclass(frozen=True)
class Tag:
    """A class and its probability in a window or an event."""

    label: str
    index: int | None  # in the model's class table; None: a heading added by the roll-up
    mid: str | None  # AudioSet's machine identifier, where the class has one
    prob: float


@dataclass(frozen=True)
class Tags:
    """The tags of a window, most probable first; or an event, which has one tag."""

    start: float  # seconds
    end: float
    tags: tuple[Tag, ...]

    @property
    def label(self) -> str:
        """The most probable class; an empty text if the window has no tags."""
        return self.tags[0].label if self.tags else ""

    @property
    def prob(self) -> float:
        """The probability of `label`; 0 if the window has no tags."""
        return self.tags[0].prob if self.tags else 0.0


Kind = Literal["windows", "events"]


class Timeline(Protocol):
    """The tags of one sound, as writers take them: a `Record`, or a `TagStream` whose pieces are not known yet.

    `seconds`, `complete` and `expected_seconds` are final once the pieces have been iterated over.
    """

    @property
    def file(self) -> str:
        """The name of the sound."""

    @property
    def model(self) -> str:
        """The name of the model."""

    @property
    def kind(self) -> Kind:
        """Whether the pieces are windows or events."""

    @property
    def channel(self) -> Channel:
        """The channel that was tagged: "mean", "left", "right", or a number from 1."""

    @property
    def rate(self) -> int | None:
        """The sampling rate of the file in Hz."""

    @property
    def began(self) -> datetime | None:
        """The clock time at the start of the sound."""

    @property
    def seconds(self) -> float:
        """The seconds that were tagged, from the start of the sound."""

    @property
    def complete(self) -> bool:
        """Whether these are the whole sound."""

    @property
    def expected_seconds(self) -> float | None:
        """The length of the sound according to its header."""

    def __iter__(self) -> Iterator[Tags]:
        """Yield the windows or events in order of time."""


@dataclass(frozen=True)
class Record:
    """The tags of one sound: a sequence of its windows or, with the option `events`, of its events.

    Attributes:
        file: the name of the sound.
        model: the name of the model.
        seconds: the seconds that were tagged, from the start of the sound.
        pieces: the windows or events in order of time.
        kind: whether the pieces are windows or events.
        channel: the channel that was tagged: "mean", "left", "right", or a number from 1.
        complete: False if the file is truncated, so that `pieces` cover only a part of the sound.
        expected_seconds: the length of the sound according to its header; None if the header has none.
        rate: the sampling rate of the file in Hz; None if not known.
        began: the clock time at the start of the sound; without a time zone if none is known.
    """

    file: str
    model: str
    seconds: float
    pieces: tuple[Tags, ...]
    kind: Kind = "windows"
    channel: Channel = "mean"
    complete: bool = True
    expected_seconds: float | None = None
    rate: int | None = None
    began: datetime | None = None

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[Tags]:
        return iter(self.pieces)

    @overload
    def __getitem__(self, place: int) -> Tags: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Tags, ...]: ...
    def __getitem__(self, place: int | slice) -> Tags | tuple[Tags, ...]:
        return self.pieces[place]

    @property
    def events(self) -> tuple[Tags, ...]:
        """The events in order of their onset.

        Raises:
            ConfigError: the pieces are windows.
        """
        if self.kind != "events":
            raise ConfigError(f"the record of {self.file} has windows; tag it with events=True to get events")
        return self.pieces

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a row for each tag, with the columns of the CSV output: file, start, end, label, mid, prob.

        If the clock time is known, rows also have `start_time` and `end_time`, in ISO 8601.
        """
        return [
            {
                "file": self.file,
                "start": piece.start,
                "end": piece.end,
                "label": tag.label,
                "mid": tag.mid,
                "prob": tag.prob,
                **({} if self.began is None else dict(zip(CLOCK_KEYS, clock_times(self.began, piece), strict=True))),
            }
            for piece in self.pieces
            for tag in piece.tags
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the record as a value for `json.dumps`; with a clock time, pieces have `start_time` and `end_time`."""
        head, pieces, tail = json_head(self), [json_piece(self, piece) for piece in self], json_tail(self)
        return {**head, "pieces": pieces, **tail}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """Return a record from a value of `to_json`.

        Raises:
            ValueError, LookupError, TypeError: the value has another format version, or is not a record.
        """
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(f"a record has format {values.get('format')}; this program reads format {FORMAT_VERSION}")
        kind, rate, began = values.get("kind", "windows"), values.get("rate"), values.get("began")
        expected = values.get("expected_seconds")
        if kind not in ("windows", "events"):
            raise ValueError(f"kind is {kind!r}; expected windows or events")
        return cls(
            _checked(values["file"], str),
            _checked(values["model"], str),
            _seconds(values["seconds"]),
            tuple(
                Tags(_seconds(piece["start"]), _seconds(piece["end"]), tuple(_tag(tag) for tag in piece["tags"]))
                for piece in values["pieces"]
            ),
            kind,
            _channel(values.get("channel", "mean")),
            values.get("complete", True) is True,
            None if expected is None else _seconds(expected),
            None if rate is None else _checked(rate, int),
            None if began is None else _time(began),
        )


def clock_times(began: datetime | None, piece: Tags) -> tuple[str, str] | tuple[None, None]:
    """Return the clock times at the start and end of a window or event, in ISO 8601; None if not known."""
    if began is None:
        return None, None
    start, end = (began + timedelta(seconds=seconds) for seconds in (piece.start, piece.end))
    return start.isoformat(timespec="milliseconds"), end.isoformat(timespec="milliseconds")


def json_head(record: Timeline) -> dict[str, Any]:
    """Return the JSON of a record before its pieces, which is known before they are."""
    clock = {} if record.began is None else {"began": record.began.isoformat()}
    return {
        "format": FORMAT_VERSION,
        "file": record.file,
        "model": record.model,
        "kind": record.kind,
        "channel": record.channel,
        "rate": record.rate,
        **clock,
    }


def json_piece(record: Timeline, piece: Tags) -> dict[str, Any]:
    """Return the JSON of one piece of a record; with a clock time it has `start_time` and `end_time`."""
    times = {} if record.began is None else dict(zip(CLOCK_KEYS, clock_times(record.began, piece), strict=True))
    return {**asdict(piece), **times}


def json_tail(record: Timeline) -> dict[str, Any]:
    """Return the JSON of a record after its pieces."""
    return {"seconds": record.seconds, "complete": record.complete, "expected_seconds": record.expected_seconds}


def _channel(value: Any) -> Channel:
    return _checked(value, int) if isinstance(value, int) else _checked(value, str)


def _tag(values: dict[str, Any]) -> Tag:
    index, mid = values["index"], values["mid"]
    return Tag(
        _checked(values["label"], str),
        None if index is None else _checked(index, int),
        None if mid is None else _checked(mid, str),
        _number(values["prob"]),
    )


def _checked(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{value!r:.40} where a {kind.__name__} is expected")
    return value


def _time(value: Any) -> datetime:
    time = iso_time(_checked(value, str))
    if time is None:
        raise ValueError(f"{value!r:.40} where a date and time is expected")
    return time


def _seconds(value: Any) -> float:
    seconds = _number(value)
    if not 0 <= seconds < 1e10:
        raise ValueError(f"{seconds} where a number of seconds is expected")
    return seconds


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} where a number is expected")
    return value
