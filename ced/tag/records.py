"""The results of tagging: the scores of a window, its tags, and one record for each sound."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

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


@dataclass(frozen=True)
class Record:
    """The tags of one sound: a sequence of its windows or, if events were asked for, of its events.

    Attributes:
        file: the name of the sound.
        model: the name of the model.
        seconds: how much of the sound was tagged, from its start.
        pieces: the windows or events, by time.
        kind: which of both the pieces are.
    """

    file: str
    model: str
    seconds: float
    pieces: tuple[Tags, ...]
    kind: Kind = "windows"

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
        return {"format": FORMAT_VERSION, **asdict(self)}

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
        return cls(values["file"], values["model"], values["seconds"], pieces, values.get("kind", "windows"))
