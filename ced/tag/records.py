"""The results of tagging: the scores of a window, its tags, and one record for each sound."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError
from ced.tag.clock import iso_time

T = TypeVar("T")

FORMAT_VERSION = 1  # of the record, and so of every output that is made of it
CLOCK_KEYS = ("start_time", "end_time")  # of windows and events, with a clock: ISO 8601


@dataclass(frozen=True, eq=False)
class Scored:
    """The scores of a window."""

    start: float  # seconds
    end: float
    probs: NDArray[np.float32]  # (c,)
    silent: bool = False  # not scored: its probabilities are 0


@dataclass(frozen=True)
class Tag:
    """A class that a window or an event is tagged with."""

    label: str
    index: int | None  # in the model's class table; None: a heading that the roll-up added
    mid: str | None  # AudioSet's machine identifier, where the class has one
    prob: float


@dataclass(frozen=True)
class Tags:
    """The tags of one window, most probable first; or an event, which has one tag."""

    start: float  # seconds
    end: float
    tags: tuple[Tag, ...]

    @property
    def label(self) -> str:
        """The most probable class; of a window without tags an empty text."""
        return self.tags[0].label if self.tags else ""

    @property
    def prob(self) -> float:
        """The probability of `label`; of a window without tags 0."""
        return self.tags[0].prob if self.tags else 0.0


Kind = Literal["windows", "events"]


@dataclass(frozen=True)
class Record:
    """The tags of one sound: a sequence of its windows or, if events were asked for, of its events.

    Attributes:
        file: the name of the sound.
        model: the name of the model.
        seconds: how much of the sound was tagged, from its start.
        pieces: the windows or events, by time.
        kind: which of both the pieces are.
        rate: the sampling rate of the sound, in Hz, before it was resampled; None: not known.
        began: the time of the clock at the start of the sound; without a time zone where none is known.
    """

    file: str
    model: str
    seconds: float
    pieces: tuple[Tags, ...]
    kind: Kind = "windows"
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
        """The events, by onset.

        Raises:
            ConfigError: the sound was tagged window by window.
        """
        if self.kind != "events":
            raise ConfigError(f"the record of {self.file} has windows; tag it with events=True to get events")
        return self.pieces

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a row for each tag, with the columns of the CSV output: file, start, end, label, mid, prob.

        With a clock there are `start_time` and `end_time`, too, in ISO 8601.
        """
        return [
            {
                "file": self.file,
                "start": piece.start,
                "end": piece.end,
                "label": tag.label,
                "mid": tag.mid,
                "prob": tag.prob,
                **({} if self.began is None else dict(zip(CLOCK_KEYS, self.clock_times(piece), strict=True))),
            }
            for piece in self.pieces
            for tag in piece.tags
        ]

    def clock_times(self, piece: Tags) -> tuple[str, str] | tuple[None, None]:
        """Return when a window or event started and ended by the clock, in ISO 8601; None if it is not known."""
        if self.began is None:
            return None, None
        start, end = (self.began + timedelta(seconds=seconds) for seconds in (piece.start, piece.end))
        return start.isoformat(timespec="milliseconds"), end.isoformat(timespec="milliseconds")

    def to_json(self) -> dict[str, Any]:
        """Return the record as a value for `json.dumps`; with a clock, pieces have `start_time` and `end_time`."""
        values = {"format": FORMAT_VERSION, **asdict(self)}
        if self.began is None:
            del values["began"]
            return values
        values["began"] = self.began.isoformat()
        for piece, described in zip(self.pieces, values["pieces"], strict=True):
            described.update(zip(CLOCK_KEYS, self.clock_times(piece), strict=True))
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """Return the record that `to_json` described.

        Raises:
            ValueError, LookupError, TypeError: it is of another format version, or not a record.
        """
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(f"a record of format {values.get('format')}; this program reads format {FORMAT_VERSION}")
        kind, rate, began = values.get("kind", "windows"), values.get("rate"), values.get("began")
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
            None if rate is None else _checked(rate, int),
            None if began is None else _time(began),
        )


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
        raise ValueError(f"{value!r:.40} in place of a {kind.__name__}")
    return value


def _time(value: Any) -> datetime:
    time = iso_time(_checked(value, str))
    if time is None:
        raise ValueError(f"{value!r:.40} in place of a date and time")
    return time


def _seconds(value: Any) -> float:
    seconds = _number(value)
    if not 0 <= seconds < 1e10:
        raise ValueError(f"{seconds} in place of a number of seconds")
    return seconds


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} in place of a number")
    return value
