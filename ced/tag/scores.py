"""Files of window scores, from which tags can be made again without the sound.

A file grows while its sound is tagged, so that an interrupted run resumes within the sound; `--keep-scores` keeps it.
It begins with a line of JSON: `{"format": 1, "classes": c, "type": "float32" or "float16", "about": {...}}`.
Chunks follow, each for a few windows: four little-endian uint32 (windows, rows, bytes, CRC-32 of the bytes), then these
bytes, which zlib expands to the number of rows of each window (uint32), starts and ends in seconds (float64), whether a
row is silent (uint8), and scores (rows, c), first the first byte of each, then the second and so on. A window has one
row, or one for each column of 0.16 s. An incomplete last chunk is ignored.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from ced.errors import StoreError
from ced.files import make_folders, open_to_append, writing
from ced.tag.records import Scored

FORMAT_VERSION = 1
UNFINISHED = ".unfinished"  # the folder of scores of unfinished sounds
KEPT = ".scores"  # suffix of kept scores, after the place of the sound's outputs
ScoreType = Literal["float32", "float16"]
_KINDS: Mapping[str, str] = {"float32": "<f4", "float16": "<f2"}
_HEAD = struct.Struct("<4I")
_FLUSH_SECONDS = 5.0  # of work that a kill may lose
_FLUSH_ROWS = 256
_LONGEST_HEADER, _LARGEST_CHUNK = 1 << 20, 1 << 30  # bytes

WindowScores = Sequence[Scored]  # the rows of one window


class ScoreLog:
    """The scores of one sound while it is tagged: those of an earlier run, then those that this run adds.

    Nothing is written during the first seconds, so short sounds leave no file.

    Args:
        out: the folder of the file.
        relative: its place there.
        classes: the number of scores in a row.
        about: what the scores depend on, as JSON values; a file with other values is overwritten.
        kind: "float32" keeps scores exactly; "float16" rounds them by 4e-4 at most, also for the tags of this run.

    Raises:
        WriteError: the file is a link, or cannot be opened.
    """

    def __init__(self, out: Path, relative: Path, classes: int, about: Mapping[str, Any], kind: ScoreType) -> None:
        self.path = out / relative
        self._out, self._relative = out, relative
        self._classes, self._type = classes, np.dtype(_KINDS[kind])
        header = {"format": FORMAT_VERSION, "classes": classes, "type": kind, "about": about}
        self._header = json.dumps(header, sort_keys=True).encode() + b"\n"
        self._file: BinaryIO | None = None
        self._waiting: list[WindowScores] = []
        self._flushed = time.monotonic()
        if self.path.is_symlink() or self.path.exists():
            self._open()

    def __enter__(self) -> "ScoreLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def stored(self) -> Iterator[WindowScores]:
        """Yield the windows of an earlier run."""
        if self._file is not None:
            self._file.seek(len(self._header))
            for windows in _chunks(self._file, self._classes, self._type):
                yield from windows

    def add(self, window: WindowScores) -> WindowScores:
        """Add a window, and return it with its scores as they are kept."""
        if self._type.itemsize < 4:
            window = [Scored(row.start, row.end, _rounded(row.probs, self._type), row.silent) for row in window]
        self._waiting.append(window)
        overdue = time.monotonic() - self._flushed >= _FLUSH_SECONDS
        if overdue or (self._file is not None and len(self._waiting) >= _FLUSH_ROWS):
            self.flush()
        return window

    def flush(self) -> None:
        """Write the waiting windows, and flush them to the operating system.

        Raises:
            WriteError: the disk is full, or the file cannot be written.
        """
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        if self._file is None:
            self._open()
        assert self._file is not None
        with writing(self.path):
            self._file.write(_chunk(self._waiting, self._type))
            self._file.flush()
        self._waiting = []

    def close(self, *, finish: bool = False) -> None:
        """Close the file; waiting windows are written if there is a file already, or if `finish` is set."""
        try:
            if self._file is not None or finish:
                self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _open(self) -> None:
        """Open the file, and drop an incomplete last chunk, or everything if `about` differs."""
        make_folders(self._out, self._relative.parent)
        self._file = open_to_append(self.path)
        with writing(self.path):
            self._file.seek(0)
            end = 0
            if self._file.readline(_LONGEST_HEADER) == self._header:
                end = len(self._header)
                for _ in _chunks(self._file, self._classes, self._type):
                    end = self._file.tell()
            self._file.truncate(end)
            if not end:
                self._file.write(self._header)
                self._file.flush()
            self._file.seek(0, 2)


def read_scores(path: Path, classes: int) -> Iterator[WindowScores]:
    """Yield the windows of a file of kept scores.

    Raises:
        StoreError: the file is missing or damaged, or has another format version or number of classes.
    """
    try:
        with path.open("rb") as file:
            values = json.loads(file.readline(_LONGEST_HEADER))
            if values["format"] != FORMAT_VERSION or values["classes"] != classes:
                raise StoreError(
                    f"{path} has format {values['format']} and {values['classes']} classes; expected format"
                    f" {FORMAT_VERSION} and {classes} classes"
                )
            end = file.tell()
            for windows in _chunks(file, classes, np.dtype(_KINDS[values["type"]])):
                end = file.tell()
                yield from windows
            if end != path.stat().st_size:
                raise StoreError(f"{path} is damaged after {end} bytes; tag the sound again")
    except OSError as error:
        raise StoreError(f"cannot read the scores {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is not a file of scores") from error


def _rounded(probs: NDArray[np.float32], kind: np.dtype[Any]) -> NDArray[np.float32]:
    return probs.astype(kind).astype(np.float32)


def _chunk(windows: Sequence[WindowScores], kind: np.dtype[Any]) -> bytes:
    rows = [row for window in windows for row in window]
    scores = np.stack([row.probs for row in rows]).astype(kind)
    parts = (
        np.array([len(window) for window in windows], "<u4").tobytes(),
        np.array([row.start for row in rows], "<f8").tobytes(),
        np.array([row.end for row in rows], "<f8").tobytes(),
        np.array([row.silent for row in rows], np.uint8).tobytes(),
        # Grouped by byte position: the first bytes of small scores are alike, and compress well.
        scores.view(np.uint8).reshape(-1, kind.itemsize).T.tobytes(),
    )
    packed = zlib.compress(b"".join(parts))
    return _HEAD.pack(len(windows), len(rows), len(packed), zlib.crc32(packed)) + packed


def _chunks(file: BinaryIO, classes: int, kind: np.dtype[Any]) -> Iterator[list[WindowScores]]:
    """Yield the windows of each complete chunk, from the position of a file to the first incomplete one."""
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        count, rows, size, check = _HEAD.unpack(head)
        expanded = 4 * count + rows * (17 + classes * kind.itemsize)
        if max(size, expanded) > _LARGEST_CHUNK or len(packed := file.read(size)) < size or zlib.crc32(packed) != check:
            return
        expander = zlib.decompressobj()
        try:
            data = expander.decompress(packed, expanded + 1)
        except zlib.error:
            return
        if len(data) != expanded:
            return
        lengths = np.frombuffer(data, "<u4", count)
        starts, ends = np.frombuffer(data, "<f8", 2 * rows, 4 * count).reshape(2, rows)
        silent = np.frombuffer(data, np.uint8, rows, 4 * count + 16 * rows)
        planes = np.frombuffer(data, np.uint8, -1, 4 * count + 17 * rows).reshape(kind.itemsize, -1)
        scores = np.ascontiguousarray(planes.T).view(kind).reshape(rows, classes).astype(np.float32)
        if lengths.sum() != rows:
            return
        every = [
            Scored(float(start), float(end), probs, bool(quiet))
            for start, end, probs, quiet in zip(starts, ends, scores, silent, strict=True)
        ]
        stops = np.cumsum(lengths, dtype=np.int64).tolist()
        yield [every[first:stop] for first, stop in pairwise([0, *stops])]
