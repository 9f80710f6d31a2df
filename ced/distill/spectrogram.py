"""Inputs of other taggers: waves at other sampling rates, and log-mel spectrograms that settings describe."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal, Self

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from ced.config import Section
from ced.distill.views import SoundView, mask_spectrogram
from ced.errors import ConfigError
from ced.model.frontend import CLIPS_AT_ONCE
from ced.sound.features import MelScale, mel_bank, mel_edges

Size = Annotated[int, Field(ge=1, le=1 << 16)]


class MelSettings(Section):
    """The mel filters."""

    bands: Size = Field(description="number of filters")
    low: float = Field(0.0, ge=0, description="Hz, lower end of the first filter")
    high: float = Field(gt=0, description="Hz, upper end of the last filter")
    scale: MelScale = Field(
        "htk", description="kaldi: that of htk, with triangles that are linear in mels; slaney: librosa's default"
    )
    area_norm: bool = Field(False, description="triangles of one area, not of one height; librosa's default")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self


class LogSettings(Section):
    """The logarithm: form(max(x, floor) + add)."""

    form: Literal["natural", "log10", "decibel"] = Field("natural", description="decibel: 10 log10")
    add: float = Field(0.0, ge=0, description="added before the logarithm")
    floor: float = Field(0.0, ge=0, description="smallest value before the logarithm")

    @model_validator(mode="after")
    def _finite(self) -> Self:
        if not self.add + self.floor:
            raise ValueError("add and floor are both 0, and the logarithm of silence is infinite; set one")
        return self


class FeatureSettings(Section):
    """How waves become a spectrogram, in the order of computation."""

    scale: float = Field(1.0, gt=0, description="factor of the waves: 1 for -1 to 1, 32768 for 16-bit numbers")
    framing: Literal["centred", "plain", "kaldi"] = Field(
        "centred", description="frame i is centred at sample i hop, or begins there (plain and kaldi)"
    )
    pre_emphasis: float = Field(0.0, ge=0, le=1, description="c of x[t] - c x[t - 1]")
    window: Size = Field(description="samples of a frame")
    window_form: Literal["hann", "hann_symmetric", "hamming", "povey"] = Field("hann", description="form of the window")
    fft: Size = Field(description="samples of the Fourier transform")
    hop: Size = Field(description="samples from one frame to the next")
    power: Literal[1, 2] = Field(2, description="exponent of the magnitude")
    mel: MelSettings = Field(description="the mel filters")
    log: LogSettings = Field(description="the logarithm")
    mean: float = Field(0.0, description="subtracted from the logarithm")
    std: float = Field(1.0, gt=0, description="divides the logarithm, less the mean")
    frames: Size | None = Field(
        None, description="number of frames: shorter inputs are padded with fill, longer ones refused; null: any number"
    )
    fill: float | None = Field(None, description="value of masked places, after normalisation; null: that of silence")

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.window > self.fft:
            raise ValueError(f"window {self.window} is longer than fft {self.fft}")
        return self


def resample(waves: Tensor, rate: int, target: int) -> Tensor:
    """Resample waves, (b, t) at `rate` -> (b, t target / rate) float32 at `target`, on their device (soxr HQ)."""
    if rate == target:
        return waves.float()
    clips = waves.float().cpu().numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = list(pool.map(lambda clip: soxr.resample(clip, rate, target, "HQ"), clips))
    return torch.from_numpy(np.stack(found)).to(waves.device)


class Spectrogram:
    """Computes the features that settings describe.

    `framing` "centred" pads the wave by reflection, so that frame i is centred at sample i hop, with the window in the
    middle of the Fourier transform. With "plain", frame i begins at sample i hop. "kaldi" is plain, and subtracts the
    mean of each frame; it applies the pre-emphasis within frames, where the others apply it to the wave.
    """

    def __init__(self, settings: FeatureSettings, rate: int) -> None:
        self.settings, self.rate = settings, rate
        mel = settings.mel
        edges = mel_edges(mel.bands, mel.low, mel.high, mel.scale)
        self.hertz = torch.from_numpy(edges[1:-1])  # (f,) centre of each band
        self.filters = torch.from_numpy(mel_bank(edges, rate, settings.fft, mel.scale, mel.area_norm))
        self.window = torch.from_numpy(_window(settings))
        self.fill = float(self._compressed(torch.zeros(()))) if settings.fill is None else settings.fill
        self._frame = settings.fft if settings.framing == "centred" else settings.window  # samples

    def frames_of(self, samples: int) -> int:
        """Return the number of frames of a wave, before padding; 0 if it is too short for one."""
        if self.settings.framing == "centred":
            # A reflected edge needs as many samples as it has, and one more.
            samples = samples - (self.settings.pre_emphasis > 0)
            return 1 + samples // self.settings.hop if samples > self.settings.fft // 2 else 0
        if self.settings.framing == "plain":
            samples = samples - (self.settings.pre_emphasis > 0)
        return max(0, 1 + (samples - self._frame) // self.settings.hop)

    def times(self, frames: int, samples: int) -> Tensor:
        """Return the centre of each of `frames` frames of a wave, (frames,), as a fraction of its `samples` samples."""
        first = 0.0 if self.settings.framing == "centred" else self._frame / 2
        return (torch.arange(frames, dtype=torch.float64) * self.settings.hop + first) / samples

    def __call__(self, waves: Tensor) -> Tensor:
        """Return the features of waves in [-1, 1], (b, t) -> (b, f, n) float32, padded to `frames`."""
        self.filters, self.window = self.filters.to(waves.device), self.window.to(waves.device)
        with torch.autocast(waves.device.type, enabled=False):
            features = torch.cat([self._features(part) for part in waves.float().split(CLIPS_AT_ONCE)])
        missing = (self.settings.frames or 0) - features.shape[2]
        return F.pad(features, (0, max(0, missing)), value=self.fill)

    def check(self, samples: int) -> None:
        """Check that waves of `samples` samples can be cut into frames, and into no more than the network takes.

        Raises:
            ConfigError: they are too short or too long.
        """
        frames, most = self.frames_of(samples), self.settings.frames
        chunk = f"a chunk of {samples / self.rate:g} s"
        if not frames:
            raise ConfigError(f"{chunk} is shorter than one frame of the features")
        if most is not None and frames > most:
            raise ConfigError(f"{chunk} has {frames} frames; at most {most} can be scored: set a shorter chunk_length")

    def mask(self, features: Tensor, views: Sequence[SoundView], samples: int) -> Tensor:
        """Mask features, (b, f, n), of waves of `samples` samples under views; frames behind their end are kept.

        A network that pads waves with silence expects its features there, and `fill` may be another value.
        """
        times = self.times(features.shape[2], samples)
        inside = int((times <= 1).sum())
        masked = mask_spectrogram(features[:, :, :inside], views, times[:inside], self.hertz, self.fill)
        return torch.cat([masked, features[:, :, inside:]], dim=2)

    def _features(self, waves: Tensor) -> Tensor:
        settings = self.settings
        waves = waves * settings.scale
        if settings.pre_emphasis and settings.framing != "kaldi":
            waves = waves[:, 1:] - settings.pre_emphasis * waves[:, :-1]
        if settings.framing == "centred":
            waves = F.pad(waves, (settings.fft // 2, settings.fft // 2), mode="reflect")
        frames = waves.unfold(1, self._frame, settings.hop)  # (b, n, frame)
        if settings.framing == "kaldi":
            frames = frames - frames.mean(2, keepdim=True)
            before = torch.cat([frames[:, :, :1], frames[:, :, :-1]], dim=2)
            frames = frames - settings.pre_emphasis * before
        spectrum = torch.fft.rfft(frames * self.window, n=settings.fft)
        power = spectrum.real.square() + spectrum.imag.square()
        return self._compressed(self.filters @ (power if settings.power == 2 else power.sqrt()).mT)

    def _compressed(self, mel: Tensor) -> Tensor:
        """Return the normalised logarithm of mel energies."""
        settings = self.settings
        log = (mel.clamp_min(settings.log.floor) + settings.log.add).log()
        if settings.log.form != "natural":
            log = log * ((10 if settings.log.form == "decibel" else 1) / np.log(10))
        return (log - settings.mean) / settings.std


def _window(settings: FeatureSettings) -> NDArray[np.float32]:
    """Return the window; if frames are centred, in the middle of as many samples as the Fourier transform has."""
    size = settings.window
    period = size if settings.window_form == "hann" else max(size - 1, 1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / period)
    forms = {"hamming": 0.08 + 0.92 * hann, "povey": hann**0.85}
    window = forms.get(settings.window_form, hann)
    if settings.framing == "centred":
        before = (settings.fft - size) // 2
        window = np.pad(window, (before, settings.fft - size - before))
    return window.astype(np.float32)
