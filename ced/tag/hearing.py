"""A sound that a stranger hands over: taken in under limits, kept as the model hears it, scored."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
from numpy.typing import NDArray

from ced.errors import AudioError
from ced.model.ort import open_session
from ced.model.runtime import front_end_file
from ced.progress import Progress, silent
from ced.sound import audio
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import HOP
from ced.tag.tagger import Tagger
from ced.tag.timeline import Overview, Timeline

if TYPE_CHECKING:
    from ced.model.ort import InferenceSession

_BLOCK = 10.0  # seconds that are read, and whose features are computed, at once


@dataclass(frozen=True)
class Limits:
    """The most that is taken of one sound."""

    megabytes: float = 200.0
    minutes: float = 60.0

    @property
    def bytes(self) -> int:
        """The limit of a file, a whole number."""
        return int(self.megabytes * 1e6)


@dataclass(frozen=True)
class Detail:
    """How finely a sound is scored."""

    window: float  # seconds
    hop: float | None = None
    columns: bool = False


DETAILS: Mapping[str, Detail] = {
    "10 s": Detail(10.0, 5.0),
    "5 s": Detail(5.0, 2.5),
    "2 s": Detail(2.0, 1.0),
    "1 s": Detail(1.0, 0.5),
    "0.16 s": Detail(10.0, columns=True),
}


@dataclass(frozen=True, eq=False)
class Clip:
    """A sound as the model hears it, in a file that browsers play."""

    name: str
    path: Path  # FLAC, mono, 16 kHz, 24 bits: 16-bit sounds at 16 kHz lose nothing
    seconds: float
    mel: NDArray[np.float32]  # (f, columns) dB


class Hearing:
    """A tagger that strangers hand sounds to."""

    def __init__(self, tagger: Tagger, model: str, limits: Limits = Limits()) -> None:
        self.tagger = tagger
        self.model = model  # what records call it
        self.limits = limits

    def take_in(self, path: Path, name: str, folder: Path) -> Clip:
        """Read a sound once, and keep what the model hears of it as a file in a folder.

        Args:
            path: the sound; it is not needed any more afterwards.
            name: what messages and records call it.
            folder: where the clip goes.

        Raises:
            AudioError: it cannot be read, or is larger or longer than the limits.
        """
        if path.stat().st_size > self.limits.bytes:
            raise AudioError(f"{name} has more than {self.limits.megabytes:g} MB, which is all that is taken here")
        kept, overview, end = folder / "clip.flac", Overview(), 0.0
        try:
            with soundfile.SoundFile(kept, "w", SAMPLE_RATE, 1, subtype="PCM_24") as file:
                for block in audio.windows(path, _BLOCK, tail="short"):
                    if block.end > self.limits.minutes * 60:
                        raise AudioError(
                            f"{name} is longer than {self.limits.minutes:g} min, which is all that is taken here"
                        )
                    file.write(np.clip(block.wave, -1.0, 1.0))
                    overview.add(self._front_end(block.wave))
                    end = block.end
        except AudioError as error:  # where it lies is nobody's business
            raise AudioError(str(error).replace(os.fspath(path), name)) from error
        return Clip(name, kept, end, overview.columns())

    def score(self, clip: Clip, detail: Detail, progress: Progress = silent) -> Timeline:
        """Score a clip; progress is told of the seconds that are done.

        Raises:
            CheckpointError: the model cannot score so finely.
        """
        scored = []
        pieces = self.tagger.score(clip.path, window=detail.window, hop=detail.hop, columns=detail.columns)
        for one in pieces:
            scored.append(one)
            progress("tagging", int(one.end), max(1, int(clip.seconds)))
        return Timeline(clip.name, self.model, clip.seconds, self.tagger.labels, tuple(scored), clip.mel)

    def _front_end(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the features of a block, (t,) -> (f, n); the frame that the next block begins with is left to it."""
        (mel,) = self._features.run(None, {"waves": wave[None]})
        found: NDArray[np.float32] = mel[0, :, : max(1, len(wave) // HOP)]
        return found

    @cached_property
    def _features(self) -> "InferenceSession":
        return open_session(front_end_file(), 1)
