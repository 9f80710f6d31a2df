"""Whether a file is all there: what formats say of their own length, and libsndfile keeps to itself or guesses."""

import os
import struct
from typing import BinaryIO

_TAIL = 1 << 17  # bytes; an OGG page has at most 65,307
_UNKNOWN = 0x7FFFF000  # sizes from here on stand for "not known yet" in files that were written to a pipe
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_XING_WITHIN = 4096  # bytes from an MP3 file's first frame


def is_cut(file: BinaryIO) -> bool:
    """Return whether a file ends within what it announces: WAV's and AIFF's samples, a part of MP4, WebM or AVI.

    Of an OGG file, which announces nothing, the last page must be whole.
    """
    place = file.tell()
    try:
        file.seek(0)
        head = file.read(12)
        if len(head) < 12:  # no format is as short
            return True
        if head[:4] == b"RIFF":
            return _chunks_are_cut(file, "<4sI", b"data") if head[8:] == b"WAVE" else _riff_is_cut(file, head)
        if head[:4] == b"FORM":
            return _chunks_are_cut(file, ">4sI", b"SSND")
        if head[4:8] == b"ftyp":
            return _boxes_are_cut(file)
        if head[:4] == _EBML:
            return _segment_is_cut(file)
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


def _riff_is_cut(file: BinaryIO, head: bytes) -> bool:
    """Look at the outermost chunk, as of AVI files."""
    (size,) = struct.unpack("<I", head[4:8])
    return bool(size < _UNKNOWN and 8 + size > file.seek(0, os.SEEK_END))


def _boxes_are_cut(file: BinaryIO) -> bool:
    """Look at the outermost boxes of an MP4 file (ISO/IEC 14496-12, 4.2)."""
    end = file.seek(0, os.SEEK_END)
    place = 0
    while place + 8 <= end:
        file.seek(place)
        size, _, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        if size == 1:
            size = long
        if size < 8:  # 0: to the end of the file; anything else is none
            return False
        place += size
    return place > end


def _segment_is_cut(file: BinaryIO) -> bool:
    """Look at the segment that follows the header of a Matroska or WebM file (RFC 8794, 4 and 6)."""
    end = file.seek(0, os.SEEK_END)
    file.seek(len(_EBML))
    header = _ebml_size(file)
    if header is None:
        return False
    segment = file.tell() + header
    if segment > end:
        return True
    file.seek(segment)
    if file.read(4) != _SEGMENT:
        return True
    size = _ebml_size(file)
    return size is not None and file.tell() + size > end


def _ebml_size(file: BinaryIO) -> int | None:
    """Read a size: as many leading zero bits as bytes follow the first; all ones mean that it is not known."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.read(more)) & ((1 << 7 * (more + 1)) - 1)
    return None if value == (1 << 7 * (more + 1)) - 1 else value


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
