"""Clips: each event of a sound cut out as a file, at the sampling rate and with the channels of the sound."""

import re
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from ced.errors import AudioError
from ced.files import cut_name, make_folders, name_with, written_aside
from ced.sound.audio import Source, name_of
from ced.sound.decode import checked, open_source
from ced.sound.reading import Reading
from ced.tag.records import Tags

_BLOCK = 10.0  # seconds decoded at a time
_FLAC_CHANNELS, _FLAC_RATE = 8, 655_350  # the most that FLAC has; WAV takes the others
_LONGEST_LABEL = 60, 120  # characters and bytes in a name


def write_clips(source: Source, events: Sequence[Tags], out: Path, relative: Path) -> list[Path]:
    """Cut events out of a sound, each into a FLAC file (WAV beyond 8 channels), and return the files.

    16-bit sound stays exact; other sound is written with 24 bits, and cut off at full scale.

    Args:
        source: read again from its beginning, so not a stream.
        events: pieces with one tag, by onset.
        out: the folder of all clips.
        relative: the place in it that names begin with: `birds/a.wav` gives `birds/a.wav 0012.500-0015.000 Dog.flac`.
            Names that would be too long are cut, as by `name_with`.

    Raises:
        AudioError: the sound cannot be read, or changes its rate or channels.
        WriteError: a clip cannot be written.
    """
    if not events:
        return []
    folder, paths = make_folders(out, relative.parent), []
    reading = Reading(name_of(source))
    with ExitStack() as stack:
        opened = open_source(source, reading, stack)
        form = (opened.rate, opened.channels)
        waiting = deque(events)
        going: list[_Clip] = []
        place = 0  # the frame that the block begins with
        for block in checked(opened.blocks(opened.frames(_BLOCK)), reading):
            if (block.rate, block.samples.shape[1]) != form:
                raise AudioError(
                    "its rate or number of channels changes, so no clips can be cut out of it", reading.name
                )
            stop = place + len(block.samples)
            while waiting and round(waiting[0].start * opened.rate) < stop:
                paths.append(folder / _name(relative, waiting[0], *form))
                going.append(stack.enter_context(_Clip(paths[-1], waiting.popleft(), *form, block.samples.dtype)))
            for clip in going:
                clip.write(block.samples, place)
            for clip in going:
                if clip.end <= stop:
                    clip.close()
            going = [clip for clip in going if clip.end > stop]
            place = stop
    return paths


class _Clip:
    """A clip that is being written; it gets its name when it is closed, unless an error ends it."""

    def __init__(self, path: Path, event: Tags, rate: int, channels: int, samples: np.dtype[Any]) -> None:
        self.start, self.end = round(event.start * rate), round(event.end * rate)
        subtype = "PCM_16" if samples == np.int16 else "PCM_24"
        with ExitStack() as opening:
            aside = opening.enter_context(written_aside(path, sync=False))
            self._file = opening.enter_context(
                soundfile.SoundFile(aside, "w", rate, channels, subtype, format=path.suffix[1:])
            )
            self._stack = opening.pop_all()

    def __enter__(self) -> "_Clip":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, samples: NDArray[Any], place: int) -> None:
        """Write the part of a block (t, channels) that belongs to the clip; the block begins with the frame `place`."""
        part = samples[max(self.start - place, 0) : max(self.end - place, 0)]
        self._file.write(part if part.dtype == np.int16 else np.clip(part, -1.0, 1.0))

    def close(self) -> None:
        """Give the file its name."""
        self._stack.close()


def _name(relative: Path, event: Tags, rate: int, channels: int) -> str:
    label = re.sub(r"[^\w,.()' -]", "_", event.label)[: _LONGEST_LABEL[0]]
    label = cut_name(label, _LONGEST_LABEL[1]).strip()
    suffix = "flac" if channels <= _FLAC_CHANNELS and rate <= _FLAC_RATE else "wav"
    return name_with(relative.name, f" {event.start:08.3f}-{event.end:08.3f} {label}.{suffix}")
