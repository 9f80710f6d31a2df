"""Detect truncated, joined and wrongly announced files from their headers.

Decoders trust headers, or correct them silently: they read the first of several joined files, as much as a wrong size
says, and what is left of a truncated file, without a warning.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ced.sound.reading import FileRange

SLACK = 0.1  # seconds; a smaller difference is padding, or a rounded length
_CHUNK = 1 << 20  # bytes read at a time in searches
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_MOST_CHUNKS = 10_000  # ordinary files have far fewer
_MOST_BOXES = 1 << 18  # two for each second of a fragmented MP4 file
_MOST_PAGES = 1 << 20  # of OGG, and tags of FLV; the end of a longer file stays unknown
_MOST_PARTS = 1000  # joined files
_MOST_TAGS = 1000
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # an MP4 or MOV file begins with one of them
_METADATA = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"cue ", b"smpl", b"JUNK", b"junk", b"FLLR", b"PAD ", b"guan")


@dataclass(frozen=True)
class FilePart:
    """A range of a file that is a sound file of its own.

    Attributes:
        start, end: the range, in bytes.
        corrections: offsets from `start`, and the bytes to read there in place of those of the file.
        prefix: bytes to read before the range.
        counted: False for an MP3 file without a length: only FFmpeg reads it to its end.
    """

    start: int
    end: int
    corrections: tuple[tuple[int, bytes], ...] = ()
    prefix: bytes = b""
    counted: bool = True


@dataclass(frozen=True)
class Structure:
    """The structure of a file according to its headers.

    Attributes:
        parts: one or several sounds, one after the other.
        complete: whether the file has all announced bytes; None: it announces none.
        seconds: the announced length, where less is there; None: unknown, or complete.
        warnings: problems, a phrase each.
        fault: why nothing can be read; None: something can.
    """

    parts: tuple[FilePart, ...]
    complete: bool | None = None
    seconds: float | None = None
    warnings: tuple[str, ...] = ()
    fault: str | None = None


def inspect(file: FileRange) -> Structure:
    """Read the headers of a file.

    Raises:
        OSError: it cannot be read.
    """
    parts: list[FilePart] = []
    warnings: dict[str, None] = {}
    while True:
        start = _after_id3(file, parts[-1].end if parts else 0)  # ID3v2 tags may precede any format
        found = _inspect(file.within(start, file.size))
        if found.fault is not None and parts:  # the parts before it can still be read
            warnings[f"part {len(parts) + 1} of the files joined in it: {found.fault}"] = None
            return Structure(tuple(parts), False, warnings=tuple(warnings))
        parts += (replace(part, start=part.start + start, end=part.end + start) for part in found.parts)
        warnings.update(dict.fromkeys(found.warnings))
        if len(parts) >= _MOST_PARTS:
            warnings[f"it is joined from more than {_MOST_PARTS} files; later ones may be missing"] = None
            found = replace(found, complete=False)
        if parts[-1].end >= file.size or len(parts) >= _MOST_PARTS:
            parts[-1] = replace(parts[-1], end=file.size)
            return replace(found, parts=tuple(parts), warnings=tuple(warnings))


def _inspect(file: FileRange) -> Structure:
    head = file.at(0, 16)
    whole = Structure((FilePart(0, file.size),))
    if len(head) < 12:  # shorter than any format
        return replace(whole, complete=False)
    if head[:4] in (b"RIFF", b"RF64", b"BW64"):
        if head[8:12] == b"WAVE":
            return _wav(file)
        return _riff(file)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(file)
    if head[:4] in (b".snd", b"dns."):
        return _au(file)
    if head[:4] == b"caff":
        return _caf(file)
    if head[:4] == b"riff":
        return _w64(file)
    if head[:4] == b"OggS":
        return _ogg(file)
    if head[:4] == b"fLaC":
        return _flac(file)
    if head[4:8] in _BOXES:
        return _boxes(file)
    if head[:4] == _EBML:
        return _segment(file)
    if head[:4] == b"FLV\x01":
        return _flv(file)
    if head == _ASF:
        return replace(whole, complete=_objects_are_complete(file))
    return _mp3(file) or whole


def _find(file: FileRange, sought: bytes, place: int) -> int:
    """Return the offset of the next occurrence of some bytes; -1: none."""
    while len(data := file.at(place, _CHUNK)) >= len(sought):
        if (found := data.find(sought)) >= 0:
            return place + found
        place += len(data) - len(sought) + 1
    return -1


def _is_unknown(size: int) -> bool:
    """Return whether a 32-bit size means "not known yet", as in files written to a pipe."""
    return size >= 0xFFFFF000 or 0x7FFFF000 <= size <= 0x80001000


# Formats with one chunk of samples of announced size.


@dataclass(frozen=True)
class _Samples:
    """The samples of a file.

    Attributes:
        place: offset of the first, in bytes.
        announced: their size according to the header, in bytes.
        second: bytes per second.
        corrected: the file with a size that makes libsndfile read to its end.
        chunks: whether chunks of metadata may follow.
    """

    place: int
    announced: int
    second: float
    corrected: FilePart
    chunks: bool = True


def _compare(file: FileRange, samples: _Samples) -> Structure:
    """Compare the announced size of the samples with that of the file."""
    whole, there, announced = FilePart(0, file.size), file.size - samples.place, samples.announced
    if there <= 0:
        return Structure((whole,), complete=not announced)
    more = announced - there
    if more > 0:
        if more > samples.place:
            return Structure((whole,), False, announced / samples.second)
        # Some recorders count the header as samples.
        warning = f"its header announces {more} bytes more than it has; nothing seems to be missing"
        return Structure((whole,), True, warnings=(warning,))
    end = samples.place + announced
    if samples.chunks:
        end += announced % 2 if is_chunk(file, end + announced % 2) else 0
        if file.at(end, 4) == b"RIFF" and file.at(end + 8, 4) == b"WAVE":
            return Structure((FilePart(0, end),))  # another file follows
        if is_chunk(file, end):
            return Structure((whole,), True)
    rest = (file.size - end) / samples.second
    if rest < SLACK:
        return Structure((whole,), True)
    if not announced:
        return Structure(
            (samples.corrected,), warnings=(f"its header was never finished; the {rest:.2f} s after it are read",)
        )
    warning = f"its header announces {announced / samples.second:.2f} s, but {rest:.2f} s more follow and are read"
    return Structure((samples.corrected,), True, warnings=(warning,))


def is_chunk(file: FileRange, place: int) -> bool:
    """Return whether the end of the file, a chunk, a tag or padding is at an offset, rather than samples."""
    head = file.at(place, 8)
    if len(head) < 8:
        return True
    if head[:4] in _METADATA or head[:3] in (b"TAG", b"ID3"):
        return True
    size = min(int.from_bytes(head[4:], "little"), int.from_bytes(head[4:], "big"))
    if all(32 <= byte < 127 for byte in head[:4]) and place + 8 + size <= file.size + 1:
        return True
    return file.size - place <= 1 << 16 and not any(file.at(place, 1 << 16))


def _chunks(file: FileRange, layout: str, place: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, size and offset of each chunk."""
    for _ in range(_MOST_CHUNKS):
        if len(head := file.at(place, 8)) < 8:
            break
        name, size = struct.unpack(layout, head)
        yield name, size, place + 8
        place += 8 + size + size % 2


def _wav(file: FileRange) -> Structure:
    wide, wide_at, second = 0, 0, 1.0
    for name, size, place in _chunks(file, "<4sI"):
        if name == b"ds64":  # of RF64 files: sizes in 64 bits
            (wide,), wide_at = struct.unpack("<Q", file.at(place + 8, 8).ljust(8, b"\0")), place + 8
        elif name == b"fmt ":
            kind, _, rate, speed, frame = struct.unpack("<HHIIH", file.at(place, 14).ljust(14, b"\0"))
            second = max(1.0, rate * frame if kind in (1, 3, 0xFFFE) else speed)  # uncompressed, or compressed
        elif name == b"data":
            there = file.size - place
            if not wide_at and there < 0xFFFFF000:
                corrected = FilePart(0, file.size, ((place - 4, b"\xff\xff\xff\xff"),))
            elif not wide_at:  # read after the header of an RF64 file, which has 64-bit sizes
                header = struct.pack(
                    "<4sI8sIQQQI", b"RF64", 0xFFFFFFFF, b"WAVEds64", 28, place + there + 36, there, 0, 0
                )
                corrected = FilePart(12, file.size, ((place - 16, b"\xff\xff\xff\xff"),), header)
            else:
                corrected = FilePart(0, file.size, ((wide_at, struct.pack("<Q", there)),))
            if _is_unknown(size) and not wide_at:
                return Structure((FilePart(0, file.size) if there < 0xFFFFF000 else corrected,))
            return _compare(file, _Samples(place, wide if _is_unknown(size) else size, second, corrected))
    return _without_samples(file, "data")


def _without_samples(file: FileRange, name: str) -> Structure:
    return Structure(
        (FilePart(0, file.size),), False, fault=f"cannot be decoded: it has no samples (no chunk {name!r})"
    )


def _aiff(file: FileRange) -> Structure:
    second = 1.0
    for name, size, place in _chunks(file, ">4sI"):
        if name == b"COMM":
            channels, bits, exponent, mantissa = struct.unpack(">H4xHHQ", file.at(place, 18).ljust(18, b"\0"))
            rate = mantissa * 2.0 ** max(-80, min(0, exponent - 16446))  # an 80-bit float
            second = max(1.0, rate * channels * bits / 8)
        elif name == b"SSND":
            there = struct.pack(">I", min(file.size - place, 0x7FFFFFFF))
            return _compare(file, _Samples(place, size, second, FilePart(0, file.size, ((place - 4, there),))))
    return _without_samples(file, "SSND")


def _au(file: FileRange) -> Structure:
    order = ">" if file.at(0, 4) == b".snd" else "<"
    place, size, kind, rate, channels = struct.unpack(f"{order}5I", file.at(4, 20).ljust(20, b"\0"))
    if _is_unknown(size):
        return Structure((FilePart(0, file.size),))
    width = {3: 2, 4: 3, 5: 4, 6: 4, 7: 8}.get(kind, 1)
    second = max(1.0, rate * channels * width)
    corrected = FilePart(0, file.size, ((8, b"\xff\xff\xff\xff"),))
    return _compare(file, _Samples(place, size, second, corrected, chunks=False))


def _caf(file: FileRange) -> Structure:
    """Read the chunks of a Core Audio file: names of 4 bytes, sizes of 8."""
    place = 8
    for _ in range(_MOST_CHUNKS):
        if len(head := file.at(place, 12)) < 12:
            break
        name, size = struct.unpack(">4sq", head)
        if size < 0:  # to the end of the file
            return Structure((FilePart(0, file.size),))
        if name == b"data" and place + 12 + size > file.size:
            return Structure(
                (FilePart(0, file.size, ((place + 4, struct.pack(">q", file.size - place - 12)),)),), complete=False
            )
        place += 12 + size
    return Structure((FilePart(0, file.size),), complete=place <= file.size)


def _w64(file: FileRange) -> Structure:
    """Read the chunks of a Sony Wave64 file: names of 16 bytes, sizes of 8 that include both."""
    place = 40
    for _ in range(_MOST_CHUNKS):
        if len(head := file.at(place, 24)) < 24:
            break
        name, size = struct.unpack("<4s12xQ", head)
        if name == b"data" and size <= 24 < file.size - place:
            corrected = FilePart(0, file.size, ((place + 16, struct.pack("<Q", file.size - place)),))
            return Structure((corrected,), warnings=("its header was never finished; the sound after it is read",))
        if size < 24:
            break
        place += size + -size % 8
    return Structure((FilePart(0, file.size),), complete=place <= file.size + 7)


# Containers of packets


def _ogg(file: FileRange) -> Structure:
    """Read the pages of an OGG file (RFC 3533), to find chained streams and an incomplete last page."""
    starts, page, place = [0], 0, 0
    beginning, last = True, 0
    complete: bool | None = None
    for _ in range(_MOST_PAGES):
        head = file.at(place, 282)
        if len(head) < 27:  # less than the header of a page
            complete = place <= file.size and not (head and b"OggS".startswith(head[:4]))
            break
        if head[:4] != b"OggS":  # the page before is damaged, or other data follows; another page may begin within it
            if (found := _find(file, b"OggS", page + 4)) < 0:
                complete = True
                break
            page = place = found
            continue
        last, page = head[5], place
        if last & 2 and not beginning and len(starts) < _MOST_PARTS:
            starts.append(place)
        beginning = bool(last & 2)
        place += 27 + head[26] + sum(head[27 : 27 + head[26]])
    warnings = ("it has no end mark, so its end may be missing",) if complete and not last & 4 else ()
    parts = tuple(FilePart(*ends) for ends in zip(starts, [*starts[1:], file.size], strict=True))
    return Structure(parts, complete, warnings=warnings)


def _flac(file: FileRange) -> Structure:
    starts, place = [0], 4
    while len(starts) < _MOST_PARTS and (place := _find(file, b"fLaC", place)) > 0:
        if file.at(place + 4, 4) in (b"\0\0\0\x22", b"\x80\0\0\x22"):  # the header of the block that is always first
            starts.append(place)
        place += 4
    # The last 36 bits of these 5 bytes are the number of frames.
    unknown = not int.from_bytes(file.at(starts[-1] + 21, 5)) & (1 << 36) - 1
    warnings = ("its header gives no length, so its end may be missing",) if unknown else ()
    parts = tuple(FilePart(*ends) for ends in zip(starts, [*starts[1:], file.size], strict=True))
    return Structure(parts, warnings=warnings)


def _boxes(file: FileRange) -> Structure:
    """Read the outermost boxes of an MP4 or MOV file (ISO/IEC 14496-12, 4.2)."""
    place, names = 0, set()
    whole = Structure((FilePart(0, file.size),))
    for _ in range(_MOST_BOXES):
        if len(head := file.at(place, 8)) < 8:
            break
        size, name = struct.unpack(">I4s", head)
        if name == b"ftyp" and b"moov" in names:  # another file
            return Structure((FilePart(0, place),), True)
        names.add(name)
        if size == 1:
            (size,) = struct.unpack(">Q", file.at(place + 8, 8).ljust(8, b"\0"))
        elif size == 0:  # to the end of the file
            place = file.size
            break
        if size < 8:  # not a box; the rest is unknown
            return whole
        place += size
    else:
        return whole
    if b"moov" not in names and b"mdat" in names:
        why = "the recording was not finished" if place <= file.size else "it is cut short"
        return replace(whole, complete=False, fault=f"cannot be decoded: it has no index (moov), so {why}")
    return replace(whole, complete=place <= file.size)


def _segment(file: FileRange) -> Structure:
    """Read the segment that follows the header of a Matroska or WebM file (RFC 8794, 4 and 6)."""
    whole = Structure((FilePart(0, file.size),))
    header, place = _ebml_size(file, len(_EBML))
    if header is None:
        return whole
    if file.at(place + header, 4) != _SEGMENT:
        return replace(whole, complete=False)
    size, place = _ebml_size(file, place + header + 4)
    if size is None:
        return whole
    return _up_to(file, place + size, _EBML)


def _riff(file: FileRange) -> Structure:
    """Read the outermost chunks of an AVI or other RIFF file; long files have several."""
    kind, place = file.at(8, 4), 0
    for _ in range(_MOST_BOXES):
        head = file.at(place, 12)
        if len(head) < 12 or head[:4] != b"RIFF" or (place and head[8:] == kind):
            break
        (size,) = struct.unpack("<I", head[4:8])
        if _is_unknown(size) or not size:
            return Structure((FilePart(0, file.size),))
        place += 8 + size + size % 2
    return _up_to(file, place - 1 if place == file.size + 1 else place, b"RIFF")


def _flv(file: FileRange) -> Structure:
    """Read the tags of an FLV file: 15 bytes around each, of which three are its length."""
    place = int.from_bytes(file.at(5, 4)) + 4
    for _ in range(_MOST_PAGES):
        head = file.at(place, 11)
        if len(head) < 11 or head[:4] == b"FLV\x01":
            return (
                _up_to(file, place, b"FLV")
                if not head or len(head) == 11
                else Structure((FilePart(0, file.size),), False)
            )
        if head[0] & 0x1F not in (8, 9, 18):  # sound, pictures, data
            break
        place += 15 + int.from_bytes(head[1:4])
    return Structure((FilePart(0, file.size),))


def _up_to(file: FileRange, end: int, start: bytes) -> Structure:
    """Return the structure of a file that ends at an offset according to its header.

    Another file may follow, which begins with `start`.
    """
    if end < file.size and file.at(end, len(start)) == start:
        return Structure((FilePart(0, end),), True)
    return Structure((FilePart(0, file.size),), end <= file.size)


def _ebml_size(file: FileRange, place: int) -> tuple[int | None, int]:
    """Return a size, None if it is unknown, and the offset after it.

    The number of leading zero bits is the number of bytes after the first; all ones mean unknown.
    """
    first = file.at(place, 1)
    if not first or not first[0]:
        return None, place
    more = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.at(place + 1, more)) & ((1 << 7 * (more + 1)) - 1)
    return (None if value == (1 << 7 * (more + 1)) - 1 else value), place + 1 + more


def _objects_are_complete(file: FileRange) -> bool | None:
    """Read the outermost objects of a WMA or ASF file: identifiers of 16 bytes, sizes of 8 that include both."""
    place = 0
    for _ in range(_MOST_BOXES):
        if len(head := file.at(place, 24)) < 24:
            break
        (size,) = struct.unpack("<16xQ", head)
        if size < 24:
            return None
        place += size
    return place <= file.size


# MPEG audio

_GARBAGE = 4096  # bytes before a frame that are skipped
_LEAST_FRAMES = 4  # frames in a row; fewer may be a coincidence
_EMPTY_ID3 = b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)  # a tag; libsndfile recognises MP3 only after one
# kbit/s of layer III: version 1; versions 2 and 2.5
_BITRATES = (
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # Hz, by version


@dataclass(frozen=True)
class _Frame:
    """An MP3 frame: its length, and the offset in it of an encoder's count of all frames, both in bytes."""

    length: int
    count_at: int


def _frame(head: bytes) -> _Frame | None:
    """Parse the 4 bytes of a frame's header; None: they are not a header of layer III."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0 or head[1] >> 1 & 3 != 1:
        return None
    version, bitrate, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return None
    first = version == 3
    length = (144_000 if first else 72_000) * _BITRATES[not first][bitrate - 1] // _RATES[version][rate]
    mono = head[3] >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return _Frame(length + (head[2] >> 1 & 1), 4 + side)


def _after_id3(file: FileRange, place: int) -> int:
    """Return the offset after any ID3v2 tags at an offset."""
    for _ in range(_MOST_TAGS):
        head = file.at(place, 10)
        if len(head) < 10 or head[:3] != b"ID3":
            break
        place += 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    return place


def _after_tags(file: FileRange, place: int) -> int:
    """Return the offset after any tags at an offset, such as those between two joined MP3 files."""
    for _ in range(_MOST_TAGS):
        before = place
        place = _after_id3(file, place)
        head = file.at(place, 32)
        if head[:3] == b"TAG":
            place += 128
        elif head[:8] == b"APETAGEX":  # the size leaves out the header
            place += 32 + int.from_bytes(head[12:16], "little")
        elif head[:11] == b"LYRICSBEGIN" and (end := _find(file, b"LYRICS200", place)) > 0:
            place = end + 9
        if place == before:
            break
    return place


def mp3_frames_at(file: FileRange, place: int) -> int | None:
    """Return the offset of the first of several frames in a row, at an offset or shortly after it; None: no frames."""
    data = file.at(place, _GARBAGE)
    for found in re.finditer(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", data):
        start = here = place + found.start()
        for _ in range(_LEAST_FRAMES):
            if (frame := _frame(file.at(here, 4))) is None:
                break
            here += frame.length
        else:
            return start
    return None


def _mp3(file: FileRange) -> Structure | None:
    """Read the count of frames that encoders put into the first one (Xing, LAME), and find what follows the last.

    Returns:
        None if the file is not MP3.
    """
    parts: list[FilePart] = []
    place, complete = 0, None
    while (start := mp3_frames_at(file, _after_tags(file, place))) is not None:
        frame = _frame(file.at(start, 4))
        assert frame is not None
        name, flags, count, size = struct.unpack(">4sIII", file.at(start + frame.count_at, 16).ljust(16, b"\0"))
        if name not in (b"Xing", b"Info") or not flags & 1 or not count:
            parts.append(FilePart(start, file.size, prefix=_EMPTY_ID3, counted=False))
            return Structure(tuple(parts))
        place = start + size
        if not flags & 2 or size < frame.length or place > file.size or len(parts) + 1 == _MOST_PARTS:
            parts.append(FilePart(start, file.size, prefix=_EMPTY_ID3))
            return Structure(tuple(parts))
        parts.append(FilePart(start, place, prefix=_EMPTY_ID3))
        complete = True
    if not parts:
        return None
    parts[-1] = replace(parts[-1], end=file.size)
    return Structure(tuple(parts), complete)
