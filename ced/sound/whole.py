"""Whether a file is all there: what formats say of their own length, and libsndfile keeps to itself or guesses."""

import os
import struct
from typing import BinaryIO

_TAIL = 1 << 17  # bytes; an OGG page has at most 65,307
_UNKNOWN = 0x7FFFF000  # sizes from here on stand for "not known yet" in files that were written to a pipe
_XING_WITHIN = 4096  # bytes from an MP3 file's first frame


def is_cut(file: BinaryIO) -> bool:
    """Return whether a WAV or AIFF file ends before its samples do, or an OGG file within a page."""
    place = file.tell()
    try:
        file.seek(0)
        head = file.read(12)
        if head[:4] == b"RIFF":
            return _chunks_are_cut(file, "<4sI", b"data")
        if head[:4] == b"FORM":
            return _chunks_are_cut(file, ">4sI", b"SSND")
        return head[:4] == b"OggS" and _ogg_is_cut(file)
    finally:
        file.seek(place)


def _chunks_are_cut(file: BinaryIO, layout: str, samples: bytes) -> bool:
    end = file.seek(0, os.SEEK_END)
    place = 12
    while place + 8 <= end:
        file.seek(place)
        name, size = struct.unpack(layout, file.read(8))
        place += 8 + size
        if name == samples:
            return bool(size < _UNKNOWN and place > end)
        place += size % 2
    return True


def _ogg_is_cut(file: BinaryIO) -> bool:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _TAIL))
    tail = file.read()
    page = tail.rfind(b"OggS")
    segments = tail[page + 26 : page + 27]
    if page < 0 or not segments:
        return True
    sizes = tail[page + 27 : page + 27 + segments[0]]
    return len(sizes) < segments[0] or page + 27 + segments[0] + sum(sizes) > len(tail)


def announces_length(file: BinaryIO) -> bool:
    """Return whether an MP3 file says how long it is (Xing's or LAME's header); otherwise libsndfile guesses."""
    place = file.tell()
    try:
        file.seek(0)
        head = file.read(10)
        start = 0
        if head[:3] == b"ID3" and len(head) == 10:
            start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        file.seek(start)
        first = file.read(_XING_WITHIN)
        return b"Xing" in first or b"Info" in first
    finally:
        file.seek(place)
