"""Views: a random augmentation of a chunk, drawn from one seed, so that teacher and student get the same input.

The order of the draws is that of the published program, so that views of published stores can be reproduced: whether to
shift, by how much, then the two uniforms that place both masks. The only other random part of distillation is mixup.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ced.config import SpecTransforms, WavTransforms
from ced.errors import ConfigError
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import HOP, PUBLISHED, frames_of, mel_edges

logger = logging.getLogger(__name__)

SHIFT_PROBABILITY = 0.5
TIME_MASK, TIME_MASK_OF = 192, 1001  # frames: the published widest time mask, and the length of its 10 s chunk
FADE = 0.01  # seconds beside the silent band of a masked wave in which it fades out and in
LARGEST_BLANKED = 0.1  # share of views that a mask may blank before the settings are refused


@dataclass(frozen=True)
class ViewRecipe:
    """The augmentations of a view; None leaves one out."""

    shift: tuple[float, float] | None = (-0.5, 0.5)  # lowest and highest shift, as fractions of the chunk
    time_mask: int | None = 192  # widest time mask, frames
    freq_mask: int | None = 24  # widest frequency mask, mel bins


NO_VIEW = ViewRecipe(shift=None, time_mask=None, freq_mask=None)


def recipe_of(wave: WavTransforms, spec: SpecTransforms, samples: int) -> ViewRecipe:
    """Return the recipe that a configuration describes, for chunks of `samples` samples.

    A time mask without a width gets the same fraction of the chunk as the published one, at most the published width.
    """
    time_mask = None
    if spec.TimeMasking:
        time_mask = spec.TimeMasking.time_mask_param or suited_time_mask(samples)
    return ViewRecipe(
        shift=(wave.Shift.min_shift, wave.Shift.max_shift) if wave.Shift else None,
        time_mask=time_mask,
        freq_mask=spec.FrequencyMasking.freq_mask_param if spec.FrequencyMasking else None,
    )


def suited_time_mask(samples: int) -> int:
    """Return the widest time mask, in frames, that suits chunks of `samples` samples: 192 for 10 s."""
    return max(1, min(TIME_MASK, TIME_MASK * frames_of(samples) // TIME_MASK_OF))


def blanked(recipe: ViewRecipe, samples: int) -> float:
    """Return the share of views, 0 to 1, whose mask covers a whole chunk of `samples` samples.

    A mask has the width u P, with u uniform in [0, 1) and P the widest: it covers n frames with probability 1 - n / P.
    """
    sizes = ((recipe.time_mask, frames_of(samples)), (recipe.freq_mask, PUBLISHED.n_mels))
    return max([0.0, *(1 - size / widest for widest, size in sizes if widest is not None)])


def blanking(recipe: ViewRecipe, samples: int) -> str | None:
    """Explain which share of the views the masks blank, and which widths fit; None if they blank no view."""
    share = blanked(recipe, samples)
    if not share:
        return None
    frames, suited = frames_of(samples), suited_time_mask(samples)
    if recipe.time_mask is not None and recipe.time_mask > frames:
        key, widest = "spectransforms.TimeMasking.time_mask_param", recipe.time_mask
        what = f"a chunk of {samples / SAMPLE_RATE:g} s has {frames} frames"
        fits = f"at most {frames} fit; {suited} is the same fraction of the chunk as in the published settings"
    else:
        key, widest = "spectransforms.FrequencyMasking.freq_mask_param", recipe.freq_mask or 0
        what, fits = (
            f"a chunk has {PUBLISHED.n_mels} mel bins",
            f"at most {PUBLISHED.n_mels} fit; 24 is the published width",
        )
    return f"{key} is {widest} and {what}: the mask blanks {share:.0%} of the views; {fits}"


def check_masks(recipe: ViewRecipe, samples: int) -> None:
    """Log a warning if a mask can blank a whole chunk of `samples` samples.

    Raises:
        ConfigError: it blanks more than `LARGEST_BLANKED` of the views.
    """
    if (problem := blanking(recipe, samples)) is None:
        return
    if blanked(recipe, samples) > LARGEST_BLANKED:
        raise ConfigError(problem)
    logger.warning(problem)


@dataclass(frozen=True)
class View:
    """The augmentation that was drawn from one seed."""

    shift: int  # samples by which the chunk is rolled to the right
    u1: float  # width of both masks, as a fraction of the widest
    u2: float  # start of both masks, as a fraction of the last possible one


def draw(recipe: ViewRecipe, seed: int, samples: int, generator: torch.Generator | None = None) -> View:
    """Draw the view of a chunk of `samples` samples from `seed`.

    A `generator` can be passed to avoid making one; it is seeded again. The global state of torch is not used.
    """
    generator = (generator or torch.Generator()).manual_seed(seed)
    shift = 0
    if recipe.shift is not None:
        apply = torch.bernoulli(torch.full((1,), SHIFT_PROBABILITY), generator=generator)
        if apply:
            low, high = (round(part * samples) for part in recipe.shift)
            shift = int(torch.randint(low, high + 1, (1,), dtype=torch.int32, generator=generator))
    u1 = float(torch.rand(1, generator=generator))
    u2 = float(torch.rand(1, generator=generator))
    return View(shift, u1, u2)


def shift_into(out: NDArray[Any], wave: NDArray[Any], shift: int) -> None:
    """Write `wave`, rolled to the right by `shift` samples, into the start of `out`, (t,) -> (>= t,)."""
    samples = len(wave)
    cut = shift % samples if samples else 0
    out[cut:samples] = wave[: samples - cut]
    out[:cut] = wave[samples - cut :]


def mask_uniforms(views: Sequence[View]) -> Tensor:
    """Return u1 and u2 of each view of a batch, (b, 2) float32."""
    return torch.tensor([[view.u1, view.u2] for view in views], dtype=torch.float32).reshape(-1, 2)


def mask(mel: Tensor, uniforms: Tensor, recipe: ViewRecipe) -> Tensor:
    """Fill one band of frames and one band of mel bins of each clip with 0 dB.

    With u1, u2 the uniforms of a clip and P the widest mask: width w = u1 P, start = floor(u2 (size - w)),
    end = start + floor(w); time first, then frequency.

    Args:
        mel: (b, f, n) dB features; not changed.
        uniforms: (b, 2) from `mask_uniforms`, on the device of `mel`.
        recipe: the widest masks.

    Returns:
        (b, f, n), masked.
    """
    for axis, widest in ((2, recipe.time_mask), (1, recipe.freq_mask)):
        if widest is None:
            continue
        size = mel.shape[axis]
        start, end = _masked(uniforms, size, widest)
        places = torch.arange(size, device=mel.device)
        inside = (places >= start[:, None]) & (places < end[:, None])  # (b, size)
        mel = mel.masked_fill(inside.unsqueeze(3 - axis), 0.0)
    return mel


def _masked(uniforms: Tensor, size: int, widest: int) -> tuple[Tensor, Tensor]:
    """Return the first place that a mask covers and the place behind its last, (b,) each; float32, as published."""
    width = uniforms[:, 0] * widest
    start = (uniforms[:, 1] * (size - width)).floor()
    return start, start + width.floor()


@dataclass(frozen=True)
class SoundView:
    """What a view masks of a chunk that its shift was already applied to, independent of any spectrogram.

    Both ends of a band belong to it; None: nothing is masked.
    """

    time: tuple[float, float] | None  # from and to, as fractions of the chunk
    hertz: tuple[float, float] | None  # lowest and highest frequency


def sound_views(uniforms: Tensor, recipe: ViewRecipe, samples: int) -> list[SoundView]:
    """Return the bands of seconds and hertz that `mask` covers in CED's mel.

    A frame stands for the time nearer to its centre than to that of its neighbours: frame i for (i - 1/2) to (i + 1/2)
    hops. A mel bin stands for the frequencies at which its triangle is higher than its neighbours': two triangles cross
    midway, in Hz, between their centres, which are corners 1 to 64 of `ced.sound.features.mel_edges`. The first and the
    last frame or bin reach to the end of the chunk, and to 0 Hz or 8 kHz.

    Args:
        uniforms: (b, 2) from `mask_uniforms`.
        recipe: how wide masks may be.
        samples: of the chunk, 16 kHz.
    """
    uniforms = uniforms.cpu()
    frames = frames_of(samples)
    times = np.clip((np.arange(frames + 1) - 0.5) * HOP / samples, 0, 1)
    times[-1] = 1.0
    centres = mel_edges(PUBLISHED.n_mels, PUBLISHED.f_min, PUBLISHED.f_max)[1:-1]
    hertz = np.concatenate([[PUBLISHED.f_min], (centres[:-1] + centres[1:]) / 2, [PUBLISHED.f_max]])
    both = ((recipe.time_mask, times), (recipe.freq_mask, hertz))
    return [
        SoundView(*pair) for pair in zip(*(_bands(uniforms, widest, bounds) for widest, bounds in both), strict=True)
    ]


def _bands(uniforms: Tensor, widest: int | None, bounds: NDArray[np.float64]) -> list[tuple[float, float] | None]:
    """Return the band that a mask covers along one axis in each of b views; `bounds` (size + 1,) are of its places."""
    if widest is None:
        return [None] * len(uniforms)
    size = len(bounds) - 1
    spans = torch.stack(_masked(uniforms, size, widest), dim=1).clamp(0, size).int().tolist()
    return [(float(bounds[start]), float(bounds[end])) if start < end else None for start, end in spans]


def mask_spectrogram(
    spectrograms: Tensor, views: Sequence[SoundView], times: Tensor, hertz: Tensor, fill: float
) -> Tensor:
    """Fill the frames and bins of any spectrogram whose centres lie in the bands of a view.

    With the frames and bins of CED's mel, these are exactly the ones that `mask` fills.

    Args:
        spectrograms: (b, f, n), left as they are.
        views: b.
        times: (n,) centre of each frame, as a fraction of the chunk.
        hertz: (f,) centre of each bin.
        fill: value that masked places get.

    Returns:
        (b, f, n), masked.
    """
    device = spectrograms.device
    in_time = _inside([view.time for view in views], times.to(device))
    in_frequency = _inside([view.hertz for view in views], hertz.to(device))
    return spectrograms.masked_fill(in_time[:, None] | in_frequency[:, :, None], fill)


def mask_waves(waves: Tensor, views: Sequence[SoundView], rate: int) -> Tensor:
    """Silence the band of time and remove the band of frequency of each view, for teachers that take only waves.

    All Fourier coefficients of the band of frequency are set to zero. Beside the silent band, the wave fades out and in
    within `FADE` seconds, so that the edges do not sound as clicks.

    Args:
        waves: (b, t), left as they are.
        views: b.
        rate: samples a second.

    Returns:
        (b, t), masked.
    """
    samples = waves.shape[1]
    spectrum = torch.fft.rfft(waves)
    hertz = torch.fft.rfftfreq(samples, 1 / rate, dtype=torch.float64, device=waves.device)
    filtered: Tensor = torch.fft.irfft(
        spectrum.masked_fill(_inside([view.hertz for view in views], hertz), 0), n=samples
    )
    places = (torch.arange(samples, dtype=torch.float64, device=waves.device) + 0.5) / samples
    low, high = _ends([view.time for view in views], waves.device)
    outside = torch.maximum(low - places, places - high)  # (b, t) distance to the band, negative inside
    gain = (outside * (samples / rate / FADE)).clamp(0, 1).to(waves.dtype)
    return filtered.mul_(gain)


def _inside(bands: Sequence[tuple[float, float] | None], places: Tensor) -> Tensor:
    """Return which of n places lie in each of b bands, (b, n) bool."""
    low, high = _ends(bands, places.device)
    return (places >= low) & (places <= high)


def _ends(bands: Sequence[tuple[float, float] | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return both ends of b bands, (b, 1) float64; an absent band lies beyond everything."""
    ends = [(math.inf, math.inf) if band is None else band for band in bands]
    low, high = torch.tensor(ends, dtype=torch.float64, device=device).reshape(-1, 2, 1).unbind(1)
    return low, high
