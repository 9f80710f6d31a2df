"""Log-mel features: settings, constants and filters in NumPy, shared by the torch network and the ONNX graph."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError
from ced.sound.audio import SAMPLE_RATE

HOP = 160  # samples from one frame to the next
PATCH = 16  # frames and mel bins of a patch; patches do not overlap
MIN_SAMPLES = (PATCH - 1) * HOP  # 2,400: the shortest wave with one column of patches
HOP_SECONDS = HOP / SAMPLE_RATE
POWER_FLOOR = 1e-10  # -100 dB
TOP_DB = 120.0  # features are clamped this far below the maximum of their clip

_LONGEST_FFT = 1 << 15


@dataclass(frozen=True)
class FrontEnd:
    """Settings of the log-mel features; the defaults are the published ones.

    Raises:
        ConfigError: a value is out of range.
    """

    n_mels: int = 64
    n_fft: int = 512
    win_size: int = 512
    hop_size: int = HOP
    f_min: float = 0.0  # Hz
    f_max: float = SAMPLE_RATE / 2
    center: bool = True

    def __post_init__(self) -> None:
        for field in ("n_fft", "win_size", "hop_size"):
            if not 1 <= getattr(self, field) <= _LONGEST_FFT:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be 1 to {_LONGEST_FFT}")
        if not PATCH <= self.n_mels <= _LONGEST_FFT or self.n_mels % PATCH:
            raise ConfigError(f"n_mels is {self.n_mels}; it must be a multiple of {PATCH}, at most {_LONGEST_FFT}")
        if self.win_size > self.n_fft:
            raise ConfigError(f"win_size {self.win_size} is longer than n_fft {self.n_fft}")
        if not 0 <= self.f_min < self.f_max <= SAMPLE_RATE / 2:
            raise ConfigError(f"f_min {self.f_min} and f_max {self.f_max} must rise within 0-{SAMPLE_RATE // 2} Hz")

    @property
    def min_samples(self) -> int:
        """Samples of the shortest wave with one column of patches; shorter waves are padded with zeros."""
        return (PATCH - 1) * self.hop_size


PUBLISHED = FrontEnd()


def frames_of(samples: int, hop: int = HOP) -> int:
    """Return the number of frames of a centred STFT over `samples` samples."""
    return 1 + samples // hop


def column_starts(count: int, piece: int, hop: int) -> NDArray[np.float64]:
    """Return the start of each of the `count` columns of patches of a wave, (count,) seconds.

    Where a piece of a long wave is not a whole number of patches long, its last few frames are in no column.

    Args:
        count: columns of all pieces.
        piece: frames of one forward pass; longer waves are cut into such pieces.
        hop: samples from one frame to the next.
    """
    pieces, places = np.divmod(np.arange(count, dtype=np.float64), piece // PATCH)
    starts: NDArray[np.float64] = (pieces * piece + places * PATCH) * hop / SAMPLE_RATE
    return starts


@cache
def mel_filters(settings: FrontEnd) -> NDArray[np.float32]:
    """Return triangular mel filters without area normalisation, (f, n_fft // 2 + 1).

    The scale is HTK's, mel(f) = 2595 log10(1 + f / 700); neighbouring triangles share their feet and tops.
    """
    low, high = 2595.0 * np.log10(1.0 + np.array([settings.f_min, settings.f_max]) / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(low, high, settings.n_mels + 2) / 2595.0) - 1.0)
    bins = np.linspace(0.0, SAMPLE_RATE / 2, settings.n_fft // 2 + 1)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return np.maximum(np.minimum(rising, falling), 0.0).astype(np.float32)


@cache
def hann_window(size: int) -> NDArray[np.float32]:
    """Return the periodic Hann window, (size,).

    It is computed in float32, like that of the published models: with a window rounded from float64, features differ
    twice as much from theirs.
    """
    half, angles = np.float32(0.5), np.arange(size, dtype=np.float32) * np.float32(2.0 * np.pi / size)
    window: NDArray[np.float32] = half - half * np.cos(angles)
    return window
