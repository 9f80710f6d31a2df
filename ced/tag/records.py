"""What tagging yields: scores while they are worked on, tags when they are done, and one versioned record a sound."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1  # of the record, and so of every output that is made of it


@dataclass(frozen=True, eq=False)
class Scored:
    """A piece of a sound and what a model makes of it."""

    start: float  # seconds
    end: float
    probs: NDArray[np.float32]  # (c,)
    silent: bool = False  # not scored: its probabilities are 0


@dataclass(frozen=True)
class Tag:
    """A class that a piece of a sound was tagged with."""

    label: str
    index: int | None  # in the model's class table; None: a parent that the roll-up added
    mid: str | None  # AudioSet's machine identifier, where the class has one
    prob: float


@dataclass(frozen=True)
class Tags:
    """The tags of one piece, most probable first; an event is a piece with one tag."""

    start: float  # seconds
    end: float
    tags: tuple[Tag, ...]


@dataclass(frozen=True)
class Record:
    """All that was found in one sound."""

    file: str
    model: str
    seconds: float  # the length of the sound
    pieces: tuple[Tags, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON has it."""
        return {"format": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """Return the record that `to_json` described.

        Raises:
            ValueError: it is of another format version.
        """
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(f"a record of format {values.get('format')}; this program writes format {FORMAT_VERSION}")
        pieces = tuple(
            Tags(piece["start"], piece["end"], tuple(Tag(**tag) for tag in piece["tags"])) for piece in values["pieces"]
        )
        return cls(values["file"], values["model"], values["seconds"], pieces)
