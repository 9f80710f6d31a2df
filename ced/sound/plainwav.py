"""Plain WAV files, 16-bit PCM, read without a decoder: setting one up takes longer than reading ten seconds of them."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ced.sound.reading import Block
from ced.sound.truncation import is_chunk
from ced.sound.view import View

_HEAD = 4096  # bytes looked at for the chunks before the samples
_PCM, _BITS = 1, 16


@dataclass(frozen=True)
class PlainWav:
    """Where the samples of a plain WAV file are, and what they mean."""

    rate: int  # Hz
    channels: int
    frames: int
    start: int  # byte of the first sample

    def blocks(self, file: BinaryIO, frames: int) -> Iterator[Block]:
        """Yield its samples from the open file, int16, up to `frames` frames a block."""
        file.seek(self.start)
        for done in range(0, self.frames, frames):
            count = min(frames, self.frames - done) * self.channels
            yield Block(np.fromfile(file, "<i2", count).reshape(-1, self.channels), self.rate)


def plain_wav(file: BinaryIO) -> PlainWav | None:
    """Look for a whole, plain WAV file; None if anything about it is out of the ordinary."""
    head = file.read(_HEAD)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    form: tuple[int, ...] = ()
    place = 12
    while place + 8 <= len(head):
        name, size = struct.unpack_from("<4sI", head, place)
        place += 8
        if name == b"data":
            break
        if name == b"fmt " and place + 16 <= len(head):
            form = struct.unpack_from("<HHIIHH", head, place)
        place += size + size % 2
    else:
        return None
    if not form:
        return None
    kind, channels, rate, _, frame, bits = form
    if (kind, bits, frame) != (_PCM, _BITS, 2 * channels) or not channels or not rate:
        return None
    view = View(file, 0, os.fstat(file.fileno()).st_size)
    end = place + size + size % 2
    if not size or size % frame or place + size > view.size or not is_chunk(view, end) or view.at(end, 4) == b"RIFF":
        return None
    return PlainWav(rate, channels, size // frame, place)
