"""Overview of a sound for drawing: peaks and log-mel columns at a low rate, computed while it is decoded."""

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ced.sound.features import HOP, HOP_SECONDS, PUBLISHED, hann_window, mel_filters

FINEST = 1 / HOP_SECONDS  # columns a second
QUIETEST = -60.0  # dB, byte 0
STEPS = 2.5  # per dB; byte 255 is 42 dB, the power of a sine at full scale in this front end


class Overview:
    """Peaks and log-mel columns of a sound, evenly spaced, each the maximum of the frames that it covers.

    Args:
        rate: columns a second, at most `FINEST`.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        # Frames are centred: the first one begins half its length before the first sample.
        self._wave = np.zeros(PUBLISHED.n_fft // 2, np.float32)
        self._frame = 0  # number of the next frame
        self._columns: list[NDArray[np.uint8]] = []  # (n, 1 + f) each: peak and mel bands of frames or columns
        self._numbers: list[NDArray[np.intp]] = []  # of their columns

    def add(self, block: NDArray[np.float32]) -> None:
        """Add the next samples, (t,) at 16 kHz."""
        self._wave = np.concatenate((self._wave, block))
        count = max(0, 1 + (len(self._wave) - PUBLISHED.n_fft) // HOP)
        if not count:
            return
        half = PUBLISHED.n_fft // 2
        frames = np.lib.stride_tricks.sliding_window_view(self._wave, PUBLISHED.n_fft)[: count * HOP : HOP]
        power = np.abs(np.fft.rfft(frames * hann_window(PUBLISHED.win_size), axis=1)) ** 2
        decibels = 10 * np.log10(power @ mel_filters(PUBLISHED).T + 1e-10)
        peaks = np.abs(self._wave[half : half + count * HOP]).reshape(count, HOP).max(1, keepdims=True)
        rows = np.concatenate((peaks * 255, (decibels - QUIETEST) * STEPS), axis=1)
        self._columns.append(np.rint(rows.clip(0, 255)).astype(np.uint8))
        self._numbers.append(((self._frame + np.arange(count)) * HOP_SECONDS * self._rate + 1e-9).astype(np.intp))
        self._frame += count
        self._wave = self._wave[count * HOP :]

    def take(self, *, finish: bool = False) -> dict[str, Any] | None:
        """Return the complete columns that were not returned before, as the fields of an overview line.

        Args:
            finish: whether the sound has ended; the last columns are returned as well.
        """
        if finish:
            self.add(np.zeros(PUBLISHED.n_fft - HOP, np.float32))
        if not self._numbers:
            return None
        columns, numbers = np.concatenate(self._columns), np.concatenate(self._numbers)
        complete = len(numbers) if finish else int(np.searchsorted(numbers, numbers[-1]))
        self._columns, self._numbers = [columns[complete:]], [numbers[complete:]]
        if not complete:
            return None
        first, last = int(numbers[0]), int(numbers[complete - 1])
        starts = np.searchsorted(numbers[:complete], np.arange(first, last + 1))
        merged = np.maximum.reduceat(columns[:complete], starts, axis=0)
        return {
            "start": first / self._rate,
            "rate": self._rate,
            "bands": PUBLISHED.n_mels,
            "peaks": base64.b64encode(merged[:, 0].tobytes()).decode(),
            "mels": base64.b64encode(merged[:, 1:].tobytes()).decode(),
        }
