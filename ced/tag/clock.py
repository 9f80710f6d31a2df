"""The clock time at which a recording began, from the metadata or the file name that recorders write.

Sources: GUANO 1.0 (chunk `guan`, "Timestamp"), EBU Tech 3285 (chunk `bext`), the comment that AudioMoth writes (chunk
`LIST`/`INFO`/`ICMT`), and file names of recorders: AudioMoth, Song Meter, BAR-LT, SoundTrap, BirdNET-Pi, phones.
"""

import io
import logging
import os
import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import PurePosixPath, PureWindowsPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from ced.errors import ConfigError

AUTO = "auto"
_ZONE = r"(?P<zone>Z|[+-]\d\d:?\d\d)?"
_NAMES = (
    # 20240501_053000.WAV, SITE_20240501_053000_000.wav, 20240501T053000+1000_REC.flac, 20240501 053000.m4a
    rf"(?<!\d)(?P<year>\d{{4}})(?P<month>\d\d)(?P<day>\d\d)[T_ -](?P<hour>\d\d)(?P<minute>\d\d)(?P<second>\d\d)"
    rf"(?P<fraction>\.\d{{1,6}}(?!\d))?{_ZONE}(?!\d)",
    # 2024-05-01T05-30-00.wav, 2024-05-01 05.30.00.m4a, 2024-05-01-birdnet-05:30:00.mp3, 2024_05_01_05_30_00.wav
    rf"(?<!\d)(?P<year>\d{{4}})[._-](?P<month>\d\d)[._-](?P<day>\d\d)[T_ -](?:birdnet-(?:\w+-)?)?"
    rf"(?P<hour>\d\d)[.:_-](?P<minute>\d\d)[.:_-](?P<second>\d\d)(?P<fraction>\.\d{{1,6}}(?!\d))?{_ZONE}(?!\d)",
    # 5678.240501053000.wav: SoundTrap's serial number and time
    r"(?<!\d)\d{4,}\.(?P<year>\d\d)(?P<month>\d\d)(?P<day>\d\d)(?P<hour>\d\d)(?P<minute>\d\d)(?P<second>\d\d)$",
)
_HEXADECIMAL = re.compile(r"[0-9A-F]{8}")  # early AudioMoths: seconds since 1970
_YEARS = range(1970, 2100)
_AUDIOMOTH_YEARS = range(2016, 2051)  # other hexadecimal numbers of eight digits are not times
_AUDIOMOTH_COMMENT = re.compile(
    r"Recorded at (?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)(?P<fraction>\.\d{1,6})?"
    r" (?P<day>\d\d)/(?P<month>\d\d)/(?P<year>\d{4}) \(UTC(?P<sign>[+-])?(?P<hours>\d{1,2})?(?::(?P<minutes>\d\d))?\)"
)
_TIMESTAMP = re.compile(r"^\s*Timestamp\s*:(.*)$", re.MULTILINE)
_BEXT = struct.Struct("<320x10s8sQ")  # origination date and time, samples since midnight
_SEPARATORS = re.compile(r"[^0-9]")
_AGREE = 2.0  # seconds; the two times of a bext chunk, with and without fractions, are one if they differ by less
_MOST_CHUNKS = 200
_LONGEST_CHUNK = 1 << 16  # bytes read of a chunk
_WANTED = (b"fmt ", b"ds64", b"bext", b"guan", b"LIST")

logger = logging.getLogger(__name__)


def parse(text: str) -> datetime | None:
    """Return the time of a `clock` option; None: "auto".

    Raises:
        ConfigError: the option is neither "auto" nor a date and time in ISO 8601.
    """
    if text == AUTO:
        return None
    time = iso_time(text)
    if time is None:
        raise ConfigError(f"clock is {text!r}; allowed: {AUTO}, or a date and time as 2024-05-01T05:30:00+02:00")
    return time


def iso_time(text: str) -> datetime | None:
    """Parse a date and time in ISO 8601; None if it is not one, or its year is impossible for a recording."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.year in _YEARS and re.search(r"\d[T ]\d", text) else None


def begin(source: object, name: str, setting: str) -> datetime | None:
    """Return the clock time at the start of a sound for an option `clock`; log a warning if there is none.

    Args:
        source, name: as for `beginning`.
        setting: as for `parse`.

    Raises:
        ConfigError: as for `parse`.
    """
    time = parse(setting) or beginning(source, name)
    if time is None:
        logger.warning("%s: neither metadata nor name has the time at its start; its tags have no clock time", name)
    return time


def beginning(source: object, name: str) -> datetime | None:
    """Return when a recording began, without a time zone if none is known; None if no source has a time.

    The order is GUANO, AudioMoth's comment, the name, and then the bext chunk, because editors write that, too. In a
    bext chunk the samples since midnight are more exact than the time of day, and are used if both agree.

    Args:
        source: a path, the bytes of a file or a seekable binary file; for other sources only the name is used.
        name: the path, address or file name.
    """
    chunks = _chunks(source)
    return _guano(chunks) or _audiomoth_comment(chunks) or from_name(name) or _bext(chunks)


def from_name(name: str) -> datetime | None:
    """Return the time in the name of a file, path or address; the last one of several."""
    if re.match(r"https?://", name, re.IGNORECASE):
        name = unquote(urlsplit(name).path)
    file = PureWindowsPath(PurePosixPath(name).name)
    for pattern in _NAMES:
        found = [time for match in re.finditer(pattern, file.stem) if (time := _time(match.groupdict())) is not None]
        if found:
            return found[-1]
    if _HEXADECIMAL.fullmatch(file.stem) and (file.suffix == ".WAV" or not file.stem.isdecimal()):
        time = datetime.fromtimestamp(int(file.stem, 16), UTC)
        return time if time.year in _AUDIOMOTH_YEARS else None
    return None


def _time(parts: Mapping[str, str | None]) -> datetime | None:
    numbers = [int(parts[part] or 0) for part in ("year", "month", "day", "hour", "minute", "second")]
    if numbers[0] < 100:
        numbers[0] += 2000
    fraction = float(parts.get("fraction") or 0)
    try:
        year, month, day, hour, minute, second = numbers
        time = datetime(year, month, day, hour, minute, second, round(fraction * 1e6), _zone(parts.get("zone")))
    except ValueError:  # the 13th month
        return None
    return time if time.year in _YEARS else None


def _zone(text: str | None) -> timezone | None:
    if not text:
        return None
    if text == "Z":
        return UTC
    digits = text[1:].replace(":", "")
    offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return timezone(-offset if text[0] == "-" else offset)


def _guano(chunks: Mapping[bytes, bytes]) -> datetime | None:
    match = _TIMESTAMP.search(chunks.get(b"guan", b"").decode("utf-8", "replace"))
    return None if match is None else iso_time(match[1].strip().strip("\0"))


def _audiomoth_comment(chunks: Mapping[bytes, bytes]) -> datetime | None:
    match = _AUDIOMOTH_COMMENT.search(chunks.get(b"LIST", b"").decode("latin-1"))
    if match is None:
        return None
    zone = f"{match['sign'] or '+'}{int(match['hours'] or 0):02}:{match['minutes'] or '00'}"
    return _time({**match.groupdict(), "zone": zone})


def _bext(chunks: Mapping[bytes, bytes]) -> datetime | None:
    chunk = chunks.get(b"bext", b"")
    if len(chunk) < _BEXT.size:
        return None
    date, time, samples = _BEXT.unpack_from(chunk)
    digits = _SEPARATORS.sub("", date.decode("latin-1"))
    try:
        midnight = datetime.strptime(digits, "%Y%m%d")
    except ValueError:
        return None
    form = chunks.get(b"fmt ", b"")
    rate = struct.unpack_from("<I", form, 4)[0] if len(form) >= 8 else 0
    exact = midnight + timedelta(seconds=samples / rate) if rate and samples < 86_400 * rate else None
    try:
        time_of_day = datetime.strptime(digits + _SEPARATORS.sub("", time.decode("latin-1")), "%Y%m%d%H%M%S")
    except ValueError:
        time_of_day = None
    if exact is not None and samples and (time_of_day is None or abs((exact - time_of_day).total_seconds()) <= _AGREE):
        time_of_day = exact
    return time_of_day if time_of_day is not None and time_of_day.year in _YEARS else None


def _chunks(source: object) -> dict[bytes, bytes]:
    """Return the chunks of a RIFF, RF64 or BW64 file that may have a time, as far as they can be read."""
    with suppress(OSError, ValueError, struct.error):
        if isinstance(source, bytes):
            return _read_chunks(io.BytesIO(source))
        if isinstance(source, str | os.PathLike):
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(source, flags), "rb") as file:
                return _read_chunks(file)
        if isinstance(source, io.IOBase) and source.seekable():
            place = source.tell()
            try:
                source.seek(0)
                return _read_chunks(source)  # type: ignore[arg-type]  # a binary file, because it was read as sound
            finally:
                source.seek(place)
    return {}


def _read_chunks(file: BinaryIO) -> dict[bytes, bytes]:
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:12] != b"WAVE":
        return {}
    found: dict[bytes, bytes] = {}
    for _ in range(_MOST_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            break
        name, size = struct.unpack("<4sI", header)
        start = file.tell()
        if name in _WANTED:
            before = found.get(name, b"")
            found[name] = before + file.read(min(size, _LONGEST_CHUNK - len(before)))
        if name == b"data" and size == 0xFFFFFFFF and len(found.get(b"ds64", b"")) >= 16:
            (size,) = struct.unpack_from("<Q", found[b"ds64"], 8)
        file.seek(start + size + size % 2)
    return found
