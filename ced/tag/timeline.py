"""A sound and its scores as arrays and pictures: the log-mel picture, the heat map of classes over time, the events."""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ced.sound.labels import ClassTable
from ced.tag.events import events
from ced.tag.records import Record, Scored
from ced.tag.select import Selection

WIDTH = 1200  # columns of a picture at most
LONG = 120.0  # seconds from which on times are in minutes
SIGNIFICANT = 80.0  # dB below the loudest that the log-mel picture tells apart
_DIMMED = 0.45  # brightness of what does not reach the threshold
# Dark to bright, for screens of either theme: value, red, green, blue.
_PALETTE = np.array(
    [
        (0, 8, 8, 32),
        (0.25, 66, 20, 104),
        (0.5, 160, 42, 98),
        (0.75, 238, 106, 52),
        (0.9, 252, 190, 80),
        (1, 252, 254, 190),
    ]
)

Picture = NDArray[np.uint8]  # (height, width, 3), red, green, blue


class Overview:
    """Features of a sound of any length in bounded memory: at most `2 * width` columns, the loudest of their frames.

    When there would be more, neighbours become one: every column stands for twice as many frames then.
    """

    def __init__(self, width: int = WIDTH) -> None:
        self._most = 2 * width
        self._step = 1  # frames a column
        self._columns: NDArray[np.float32] | None = None  # (f, columns)
        self._rest: NDArray[np.float32] | None = None  # (f, fewer than `step`)

    def add(self, mel: NDArray[np.float32]) -> None:
        """Add the next frames, (f, n)."""
        if self._rest is not None:
            mel = np.concatenate((self._rest, mel), axis=1)
        whole = mel.shape[1] // self._step * self._step
        self._rest = mel[:, whole:]
        fresh = _loudest(mel[:, :whole], self._step)
        held = fresh if self._columns is None else np.concatenate((self._columns, fresh), axis=1)
        while held.shape[1] > self._most:
            even = held.shape[1] // 2 * 2
            if even < held.shape[1]:  # half of the next column, already reduced: as good as its frames
                self._rest = np.concatenate((np.repeat(held[:, even:], self._step, axis=1), self._rest), axis=1)
            held = _loudest(held[:, :even], 2)
            self._step *= 2
        self._columns = held

    def columns(self) -> NDArray[np.float32]:
        """Return what is there, (f, columns)."""
        parts = [part for part in (self._columns, self._rest) if part is not None]
        if not parts:
            return np.zeros((1, 1), np.float32)
        columns, rest = parts
        return np.concatenate((columns, rest.max(axis=1, keepdims=True)), axis=1) if rest.shape[1] else columns


def _loudest(mel: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Return the highest of every `step` columns, (f, n) -> (f, n // step)."""
    reduced: NDArray[np.float32] = mel.reshape(len(mel), mel.shape[1] // step, step).max(axis=2)
    return reduced


@dataclass(frozen=True)
class Filter:
    """What of the scores is shown; changing it needs no model."""

    threshold: float = 0.5  # of events
    only: tuple[str, ...] = ()  # labels or headings; none: all
    rows: int = 8  # of the heat map


@dataclass(frozen=True, eq=False)
class Timeline:
    """A sound that has been scored."""

    name: str
    model: str
    seconds: float
    labels: ClassTable
    scored: tuple[Scored, ...]
    mel: NDArray[np.float32]  # (f, columns) dB, evenly spread over the sound

    def record(self, chosen: Filter) -> Record:
        """Return the events, as `ced tag --events` finds them.

        Raises:
            ConfigError: the threshold is negative or a label is unknown.
        """
        return Record(self.name, self.model, self.seconds, tuple(events(self.scored, self._selection(chosen))))

    def heat(self, chosen: Filter) -> "Heat":
        """Return the classes with the highest probabilities over time, the highest first.

        Raises:
            ConfigError: as `record`.
        """
        selection = self._selection(chosen)
        probs = np.stack([one.probs for one in self.scored], axis=1)  # (c, windows)
        peaks = probs.max(axis=1)
        allowed = np.flatnonzero(_allowed(selection, len(self.labels)))
        best = allowed[np.argsort(-peaks[allowed], kind="stable")[: chosen.rows]]
        names = tuple(self.labels.names[index] for index in best)
        return Heat(names, peaks[best], over_time(probs[best], self._edges(), self.seconds))

    def _selection(self, chosen: Filter) -> Selection:
        return Selection(self.labels, top_k=None, thresholds=chosen.threshold, only=chosen.only)

    def _edges(self) -> NDArray[np.float64]:
        """Return where each window begins to speak, and where the last one ends: half-way through their overlap."""
        starts = np.array([one.start for one in self.scored])
        ends = np.array([one.end for one in self.scored])
        return np.concatenate((starts[:1], (ends[:-1] + starts[1:]) / 2, ends[-1:]))


@dataclass(frozen=True, eq=False)
class Heat:
    """Probabilities over time of a few classes."""

    labels: tuple[str, ...]
    peaks: NDArray[np.float32]  # (rows,) the highest of each
    values: NDArray[np.float32]  # (rows, columns), evenly spread over the sound


def _allowed(selection: Selection, count: int) -> NDArray[np.bool_]:
    return selection.reached(np.full(count, np.inf, np.float32))


def over_time(values: NDArray[np.float32], edges: NDArray[np.float64], seconds: float) -> NDArray[np.float32]:
    """Spread the values of pieces evenly over time; where several share a column, the highest counts.

    Args:
        values: (rows, pieces).
        edges: (pieces + 1), seconds; each piece reaches from one to the next.
        seconds: the length of the whole.

    Returns:
        (rows, columns), at most `WIDTH` of them.
    """
    finest = max(float(np.diff(edges).min()), seconds / WIDTH)
    width = min(WIDTH, max(1, math.ceil(4 * seconds / finest)))  # edges fall between columns: a quarter is near enough
    times = np.linspace(0.0, seconds, width + 1)
    last = len(edges) - 2
    first = np.clip(np.searchsorted(edges, times[:-1], "right") - 1, 0, last)
    behind = np.clip(np.searchsorted(edges, times[1:], "left"), first + 1, last + 1)
    columns = [values[:, begin:end].max(axis=1) for begin, end in zip(first, behind, strict=True)]
    return np.stack(columns, axis=1)


def heat_picture(heat: Heat, threshold: float, row_height: int = 1) -> Picture:
    """Draw a heat map, a row a class; what does not reach the threshold is dimmed."""
    bright = np.where(heat.values >= threshold, 1.0, _DIMMED)[..., None]
    return np.repeat((_coloured(heat.values) * bright).astype(np.uint8), row_height, axis=0)


def mel_picture(mel: NDArray[np.float32]) -> Picture:
    """Draw features (f, columns) in dB, low frequencies at the bottom."""
    loudest = float(mel.max())
    return _coloured((mel[::-1] - (loudest - SIGNIFICANT)) / SIGNIFICANT).astype(np.uint8)


def _coloured(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the colour of each value, 0 to 1."""
    return np.stack([np.interp(values, _PALETTE[:, 0], _PALETTE[:, channel]) for channel in (1, 2, 3)], axis=-1)


def png(picture: Picture) -> bytes:
    """Return a picture as a PNG file (ISO/IEC 15948)."""
    height, width, _ = picture.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(picture))  # 0: stored as they are
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits of red, green, blue
        (b"IDAT", zlib.compress(rows, 6)),
        (b"IEND", b""),
    )
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ticks(seconds: float, most: int = 10) -> Sequence[float]:
    """Return round times of an axis, from 0, no more than `most` steps."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    step = next((step for step in steps if seconds / step <= most), 3600.0 * math.ceil(seconds / 3600 / most))
    return [round(number * step, 6) for number in range(int(seconds / step + 1e-9) + 1)]


def clock(seconds: float, whole: float) -> str:
    """Return a time as people read it: seconds or, in a whole of two minutes and more, minutes and seconds."""
    if whole < LONG:
        return f"{seconds:.2f}".rstrip("0").rstrip(".")
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:04.1f}".removesuffix(".0")


def unit(whole: float) -> str:
    """Return the unit of the times that `clock` gives."""
    return "s" if whole < LONG else "min"
