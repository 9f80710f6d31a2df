"""Log-mel features: settings, constants and filters in NumPy, shared by the torch network and the ONNX graph."""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError

SAMPLE_RATE = 16_000  # Hz, of all waves
HOP = 160  # samples from one frame to the next
PATCH = 16  # frames and mel bins of a patch; patches do not overlap
MIN_SAMPLES = (PATCH - 1) * HOP  # 2,400: the shortest wave with one column of patches
HOP_SECONDS = HOP / SAMPLE_RATE
POWER_FLOOR = 1e-10  # -100 dB
TOP_DB = 120.0  # features are clamped this far below the maximum of their clip

MelScale = Literal["htk", "kaldi", "slaney"]
MEL_SCALES: tuple[MelScale, ...] = get_args(MelScale)
_SLANEY_LINEAR = 200 / 3  # Hz a mel below 1 kHz
_SLANEY_STEP = np.log(6.4) / 27  # of log frequency, a mel above 1 kHz
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


def to_mels(hertz: NDArray[np.float64], scale: MelScale = "htk") -> NDArray[np.float64]:
    """Convert frequencies to mels.

    The scales of HTK and Kaldi are 2595 log10(1 + f / 700); that of Slaney's Auditory Toolbox is linear below 1 kHz and
    logarithmic above.
    """
    if scale != "slaney":
        mels: NDArray[np.float64] = 2595.0 * np.log10(1.0 + hertz / 700.0)
        return mels
    above = 15 + np.log(np.maximum(hertz, 1000.0) / 1000.0) / _SLANEY_STEP
    return np.where(hertz < 1000.0, hertz / _SLANEY_LINEAR, above)


def to_hertz(mels: NDArray[np.float64], scale: MelScale = "htk") -> NDArray[np.float64]:
    """Convert mels to frequencies; the inverse of `to_mels`."""
    if scale != "slaney":
        hertz: NDArray[np.float64] = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
        return hertz
    above = 1000.0 * np.exp((np.maximum(mels, 15.0) - 15) * _SLANEY_STEP)
    return np.where(mels < 15.0, mels * _SLANEY_LINEAR, above)


def mel_edges(n_mels: int, f_min: float, f_max: float, scale: MelScale = "htk") -> NDArray[np.float64]:
    """Return the corners of triangular mel filters, (n_mels + 2,) Hz.

    Filter j rises from corner j to its centre, corner j + 1, and falls to corner j + 2.
    """
    low, high = to_mels(np.array([f_min, f_max]), scale)
    return to_hertz(np.linspace(low, high, n_mels + 2), scale)


def mel_bank(
    edges: NDArray[np.float64], rate: int, n_fft: int, scale: MelScale = "htk", area_norm: bool = False
) -> NDArray[np.float32]:
    """Return triangular filters with the given corners, (f, n_fft // 2 + 1).

    Args:
        edges: (f + 2,) Hz, from `mel_edges`.
        rate: of the waves, Hz.
        n_fft: samples of the Fourier transform.
        scale: with "kaldi" the triangles are linear in mels, otherwise in Hz.
        area_norm: whether each triangle has the area 1 (over Hz), and not the height 1.
    """
    bins = np.linspace(0.0, rate / 2, n_fft // 2 + 1)
    corners = edges
    if scale == "kaldi":
        bins, corners = to_mels(bins, scale), to_mels(edges, scale)
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    filters = np.maximum(np.minimum(rising, falling), 0.0)
    if area_norm:
        filters *= 2.0 / (edges[2:] - edges[:-2])[:, None]
    return filters.astype(np.float32)


@cache
def mel_filters(settings: FrontEnd) -> NDArray[np.float32]:
    """Return triangular mel filters without area normalisation, (f, n_fft // 2 + 1).

    The scale is HTK's; neighbouring triangles share their feet and tops.
    """
    return mel_bank(mel_edges(settings.n_mels, settings.f_min, settings.f_max), SAMPLE_RATE, settings.n_fft)


@cache
def hann_window(size: int) -> NDArray[np.float32]:
    """Return the periodic Hann window, (size,).

    It is computed in float32, like that of the published models: with a window rounded from float64, features differ
    twice as much from theirs.
    """
    half, angles = np.float32(0.5), np.arange(size, dtype=np.float32) * np.float32(2.0 * np.pi / size)
    window: NDArray[np.float32] = half - half * np.cos(angles)
    return window
