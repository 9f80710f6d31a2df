"""The log-mel front end: the one definition of the features that every model, teacher and student sees."""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from ced.sound.audio import SAMPLE_RATE
from ced.sound.grid import HOP

N_FFT = 512
N_MELS = 64
F_MIN = 0.0
F_MAX = SAMPLE_RATE / 2
POWER_FLOOR = 1e-10  # -100 dB
TOP_DB = 120.0
CLIPS_AT_ONCE = 2  # on a CPU


def frames_of(samples: int, hop: int = HOP) -> int:
    """Return the number of frames of a centred STFT over `samples` samples."""
    return 1 + samples // hop


def mel_filters(n_mels: int = N_MELS, n_fft: int = N_FFT, f_min: float = F_MIN, f_max: float = F_MAX) -> Tensor:
    """Return triangular mel filters without area normalisation, (f, n_fft // 2 + 1), float32.

    The scale is HTK's, mel(f) = 2595 log10(1 + f / 700); neighbouring triangles share their feet and tops.
    """
    low, high = (2595.0 * math.log10(1.0 + f / 700.0) for f in (f_min, f_max))
    mels = torch.linspace(low, high, n_mels + 2, dtype=torch.float32)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    bins = torch.linspace(0.0, SAMPLE_RATE / 2, n_fft // 2 + 1, dtype=torch.float32)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp_min(0.0)


class LogMel(nn.Module):
    """Turn waves into log-mel features in decibels, each clip on its own.

    Power STFT (periodic Hann), mel filters, 10 log10(max(x, 1e-10)), then clamped at `TOP_DB` below the clip's own
    maximum. Always float32, also under autocast and in a network of 16 bits. The same wave gives the same bits whatever
    else is in the batch.
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        n_mels: int = N_MELS,
        n_fft: int = N_FFT,
        win_size: int = N_FFT,
        hop_size: int = HOP,
        f_min: float = F_MIN,
        f_max: float = F_MAX,
        center: bool = True,
    ) -> None:
        super().__init__()
        self.n_fft, self.win_size, self.hop_size, self.center = n_fft, win_size, hop_size, center
        # Derived from constants, so never part of a checkpoint.
        self.register_buffer("window", torch.hann_window(win_size, dtype=torch.float32), persistent=False)
        self.register_buffer("filters", mel_filters(n_mels, n_fft, f_min, f_max), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Go along to another device, but not to another type: there are no spectra in 16 bits."""

        def moved(tensor: Tensor) -> Tensor:
            other = fn(tensor)
            return other if other.dtype == tensor.dtype else tensor.to(other.device)

        same: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return same

    def forward(self, waves: Tensor) -> Tensor:
        """Return the features of waves in [-1, 1].

        Args:
            waves: (b, t) float, 16 kHz, t > n_fft // 2 (the reflect padding needs as many samples).

        Returns:
            (b, f, n) float32 dB, n = 1 + t // hop.
        """
        if waves.device.type != "cpu":
            return self._features(waves)
        # A spectrum takes six times the memory of its wave: a few clips at a time stay in the caches.
        return torch.cat([self._features(part) for part in waves.split(CLIPS_AT_ONCE)])

    def _features(self, waves: Tensor) -> Tensor:
        with torch.autocast(waves.device.type, enabled=False):
            spectrum = torch.stft(
                waves.float(),
                n_fft=self.n_fft,
                hop_length=self.hop_size,
                win_length=self.win_size,
                window=self.window,
                center=self.center,
                pad_mode="reflect",
                return_complex=True,
            )
            power = spectrum.real.square() + spectrum.imag.square()
            # One matrix product a clip: a single product over the whole batch may round differently with its size.
            mel = torch.bmm(self.filters.expand(power.shape[0], -1, -1), power)
            decibels = 10.0 * mel.clamp_min(POWER_FLOOR).log10()
            return decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - TOP_DB)
