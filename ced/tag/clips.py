"""Clips: write each event of a sound to a file, with the sampling rate and the channels of the sound."""

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

_BLOCK = 10.0  # seconds decoded at once
_FLAC_CHANNELS, _FLAC_RATE = 8, 655_350  # the limits of FLAC; WAV is used beyond them
_LONGEST_LABEL = 60, 120  # characters and bytes in a file name


def write_clips(source: Source, events: Sequence[Tags], out: Path, relative: Path) -> list[Path]:
    """Write the events of a sound to FLAC files (WAV beyond 8 channels), and return their paths.

    16-bit sound stays exact; other sound is written with 24 bits, and clipped at full scale.

    Args:
        source: read again from its beginning, so it cannot be a stream.
        events: pieces with one tag, in order of onset.
        out: the folder of all clips.
        relative: the prefix of names in it: `birds/a.wav` gives `birds/a.wav 0012.500-0015.000 Dog.flac`. Names that
            would be too long are shortened, as by `name_with`.

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
        place = 0  # the first frame of the block
        for block in checked(opened.blocks(opened.frames(_BLOCK)), reading):
            if (block.rate, block.samples.shape[1]) != form:
                raise AudioError(
                    "its sampling rate or number of channels changes, so clips cannot be cut out of it", reading.name
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
    """A clip while it is written; it gets its name when it is closed, and is deleted after an error."""

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
        """Write the part of a block (t, channels) that belongs to the clip; `place` is the first frame of the block."""
        part = samples[max(self.start - place, 0) : max(self.end - place, 0)]
        self._file.write(part if part.dtype == np.int16 else np.clip(part, -1.0, 1.0))

    def close(self) -> None:
        """Finish the file, and give it its name."""
        self._stack.close()


def _name(relative: Path, event: Tags, rate: int, channels: int) -> str:
    label = re.sub(r"[^\w,.()' -]", "_", event.label)[: _LONGEST_LABEL[0]]
    label = cut_name(label, _LONGEST_LABEL[1]).strip()
    suffix = "flac" if channels <= _FLAC_CHANNELS and rate <= _FLAC_RATE else "wav"
    return name_with(relative.name, f" {event.start:08.3f}-{event.end:08.3f} {label}.{suffix}")
