"""The log-mel front end in torch: the features of every network, teacher and student."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ced.sound.features import POWER_FLOOR, PUBLISHED, TOP_DB, FrontEnd, hann_window, mel_filters

CLIPS_AT_ONCE = 2  # on a CPU


class LogMel(nn.Module):
    """Turn waves into log-mel features in decibels, each clip on its own.

    Power STFT (periodic Hann), mel filters, 10 log10(max(x, 1e-10)), then clamped at `TOP_DB` below the clip's own
    maximum. Always float32, also under autocast and in a 16-bit network. The features of a wave are the same, bit for
    bit, in any batch.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, settings: FrontEnd = PUBLISHED) -> None:
        super().__init__()
        self.settings = settings
        # Derived from constants, so never part of a checkpoint.
        self.register_buffer("window", torch.tensor(hann_window(settings.win_size)), persistent=False)
        self.register_buffer("filters", torch.tensor(mel_filters(settings)), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, but keep float32: 16-bit spectra would be useless."""

        def moved(tensor: Tensor) -> Tensor:
            other = fn(tensor)
            return other if other.dtype == tensor.dtype else tensor.to(other.device)

        same: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return same

    def forward(self, waves: Tensor) -> Tensor:
        """Return the features of waves.

        Args:
            waves: (b, t) float in [-1, 1], 16 kHz; those shorter than one patch (2,400 samples) are padded with zeros.

        Returns:
            (b, f, n) float32 dB, n = 1 + t // hop, at least 16.
        """
        if (missing := self.settings.min_samples - waves.shape[-1]) > 0:
            waves = F.pad(waves, (0, missing))
        if waves.device.type != "cpu":
            return self._features(waves)
        # A spectrum takes six times the memory of its wave: a few clips at a time stay in the caches.
        return torch.cat([self._features(part) for part in waves.split(CLIPS_AT_ONCE)])

    def _features(self, waves: Tensor) -> Tensor:
        decibels = self.decibels(waves, self.settings.center)
        return decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - TOP_DB)

    def decibels(self, waves: Tensor, center: bool) -> Tensor:
        """Return features before the clamp, for clips that are computed in parts.

        Args:
            waves: (b, t) float, 16 kHz.
            center: pad the waves by reflection; otherwise frames start at the first sample.

        Returns:
            (b, f, n) float32 dB.
        """
        with torch.autocast(waves.device.type, enabled=False):
            spectrum = torch.stft(
                waves.float(),
                n_fft=self.settings.n_fft,
                hop_length=self.settings.hop_size,
                win_length=self.settings.win_size,
                window=self.window,
                center=center,
                pad_mode="reflect",
                return_complex=True,
            )
            power = spectrum.real.square() + spectrum.imag.square()
            # One matrix product a clip: a single product over the whole batch may round differently with its size.
            mel = torch.bmm(self.filters.expand(power.shape[0], -1, -1), power)
            return 10.0 * mel.clamp_min(POWER_FLOOR).log10()
