"""The results of tagging: the scores of a window, its tags, and one record for each sound."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError

FORMAT_VERSION = 1  # of the record, and so of every output that is made of it


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
Channel = str | int  # "mean", "left", "right", or a number from 1


class Timeline(Protocol):
    """The tags of one sound as writers take them: a `Record`, or a `TagStream` whose pieces are still to come.

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
        """What was tagged of a sound of several channels."""

    @property
    def seconds(self) -> float:
        """How much of the sound was tagged, from its start."""

    @property
    def complete(self) -> bool:
        """Whether that is the whole sound."""

    @property
    def expected_seconds(self) -> float | None:
        """The length of the sound according to its header."""

    def __iter__(self) -> Iterator[Tags]:
        """Yield the windows or events, by time."""


@dataclass(frozen=True)
class Record:
    """The tags of one sound: a sequence of its windows or, if events were asked for, of its events.

    Attributes:
        file: the name of the sound.
        model: the name of the model.
        seconds: how much of the sound was tagged, from its start.
        pieces: the windows or events, by time.
        kind: which of both the pieces are.
        channel: what was tagged of a sound of several channels: "mean", "left", "right", or a number from 1.
        complete: False if the file is cut short, so that `pieces` cover only a part of the sound.
        expected_seconds: the length of the sound according to its header; None if that does not say.
    """

    file: str
    model: str
    seconds: float
    pieces: tuple[Tags, ...]
    kind: Kind = "windows"
    channel: Channel = "mean"
    complete: bool = True
    expected_seconds: float | None = None

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
        """Return a row for each tag, with the columns of the CSV output: file, start, end, label, mid, prob."""
        return [
            {
                "file": self.file,
                "start": piece.start,
                "end": piece.end,
                "label": tag.label,
                "mid": tag.mid,
                "prob": tag.prob,
            }
            for piece in self.pieces
            for tag in piece.tags
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the record as a value for `json.dumps`."""
        values = asdict(self)
        pieces = values.pop("pieces")
        return {"format": FORMAT_VERSION, **values, "pieces": pieces}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """Return the record that `to_json` described.

        Raises:
            ValueError: it is of another format version.
        """
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(f"a record of format {values.get('format')}; this program reads format {FORMAT_VERSION}")
        pieces = tuple(
            Tags(piece["start"], piece["end"], tuple(Tag(**tag) for tag in piece["tags"])) for piece in values["pieces"]
        )
        fields = ("file", "model", "seconds", "kind", "channel", "complete", "expected_seconds")
        return cls(**{name: values[name] for name in fields if name in values}, pieces=pieces)
