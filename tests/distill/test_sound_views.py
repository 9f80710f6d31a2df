"""A view covers the same seconds and hertz in CED's mel, in other spectrograms and in waves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ced.config import check
from ced.distill.spectrogram import FeatureSettings, Spectrogram
from ced.distill.views import (
    SoundView,
    ViewRecipe,
    mask,
    mask_spectrogram,
    mask_waves,
    sound_views,
    suited_time_mask,
)
from ced.model.frontend import LogMel
from ced.sound.features import HOP, frames_of, mel_edges

CENTRES = torch.from_numpy(mel_edges(64, 0, 8000)[1:-1])
uniform = st.floats(0, 1, exclude_max=True, width=32)
chunks = st.sampled_from([16_000, 31_000, 80_000])
# As AST and as EfficientAT: 10 ms frames from the first sample, and centred ones of a wave of 32 kHz.
PICTURES = {
    "kaldi": (16_000, {"framing": "kaldi", "window": 400, "fft": 512, "hop": 160, "mel": {"bands": 128, "high": 8000}}),
    "centred": (32_000, {"window": 800, "fft": 1024, "hop": 320, "mel": {"bands": 128, "high": 15000}}),
    "coarse": (8_000, {"window": 512, "fft": 512, "hop": 256, "mel": {"bands": 40, "high": 4000, "scale": "slaney"}}),
}


def spectrogram(name: str) -> Spectrogram:
    rate, values = PICTURES[name]
    return Spectrogram(check(FeatureSettings, {"log": {"floor": 1e-10}} | values, "test"), rate)


def extent(filled: Tensor, axis: int) -> tuple[int, int] | None:
    """Return the first and last place along an axis of (f, n) that are filled all along the other axis."""
    places = filled.all(1 - axis).nonzero().flatten()
    return (int(places[0]), int(places[-1])) if len(places) else None


@given(u1=uniform, u2=uniform, samples=chunks, widest=st.integers(1, 64))
def test_the_bands_of_a_view_are_the_masks_of_the_published_mel(
    u1: float, u2: float, samples: int, widest: int
) -> None:
    recipe = ViewRecipe(time_mask=suited_time_mask(samples), freq_mask=widest)
    uniforms, mel = torch.tensor([[u1, u2]]), torch.ones(1, 64, frames_of(samples))
    times = torch.arange(frames_of(samples), dtype=torch.float64) * HOP / samples
    views = sound_views(uniforms, recipe, samples)
    assert torch.equal(mask_spectrogram(mel, views, times, CENTRES, 0.0), mask(mel, uniforms, recipe))


@settings(max_examples=60, deadline=None)
@given(u1=uniform, u2=uniform, samples=chunks, name=st.sampled_from(list(PICTURES)))
def test_other_spectrograms_cover_the_same_seconds_and_hertz_within_a_bin(
    u1: float, u2: float, samples: int, name: str
) -> None:
    recipe = ViewRecipe(time_mask=suited_time_mask(samples))
    other, uniforms = spectrogram(name), torch.tensor([[u1, u2]])
    resampled = samples * other.rate // 16_000
    count = other.frames_of(resampled)
    views = sound_views(uniforms, recipe, samples)
    theirs = other.mask(torch.full((1, len(other.hertz), count), 5.0), views, resampled)[0] != 5
    ours = mask(torch.ones(1, 64, frames_of(samples)), uniforms, recipe)[0] == 0
    hop = other.settings.hop / other.rate
    first = 0.0 if other.settings.framing == "centred" else other.settings.window / other.rate / 2
    seconds = (np.arange(frames_of(samples)) * 0.01, np.arange(count) * hop + first)
    hertz = (CENTRES.numpy(), other.hertz.numpy())
    for axis, (student, teacher) in ((1, seconds), (0, hertz)):
        seen, masked = extent(ours, axis), extent(theirs, axis)
        if masked is None:  # nothing is masked, or a band between two of the teacher's bins or above all of them
            inside = [] if seen is None else [at for at in teacher if student[seen[0]] <= at <= student[seen[1]]]
            assert not inside
            continue
        assert seen is not None
        for side in (0, 1):
            at, place = masked[side], seen[side]
            bins = [
                np.diff(line)[max(here - 1, 0) : here + 1].max() for line, here in ((student, place), (teacher, at))
            ]
            # Features that begin after the student's, or end before them, are masked to their end.
            ends = at == 0 and student[place] < teacher[at] if side == 0 else at == len(teacher) - 1
            assert ends or abs(student[place] - teacher[at]) <= max(bins)


@pytest.mark.parametrize("pair", [(0.5, 0.3), (0.9, 0.05), (0.4, 0.95)])
def test_a_masked_wave_is_silent_where_the_student_is_masked_and_nowhere_else(pair: tuple[float, float]) -> None:
    samples, recipe, uniforms = 32_000, ViewRecipe(time_mask=60), torch.tensor([pair])
    noise = torch.randn(1, samples, generator=torch.Generator().manual_seed(1)) * 0.1
    masked = mask_waves(noise, sound_views(uniforms, recipe, samples), 16_000)
    lost = LogMel()(noise)[0] - LogMel()(masked)[0]  # dB
    hidden = mask(torch.ones(1, 64, frames_of(samples)), uniforms, recipe)[0] == 0
    rows, columns = hidden.all(1), hidden.all(0)
    # Neighbouring mel filters overlap, and so do the windows of up to three frames.
    assert lost[_shrunk(rows, 1)].mean() > 20
    assert lost[:, _shrunk(columns, 3)].min() > 40
    assert lost[_shrunk(~rows, 1)][:, _shrunk(~columns, 4)].abs().mean() < 0.3


def _shrunk(places: Tensor, by: int) -> Tensor:
    """Return which places are `by` or more away from all that are not set."""
    return ~torch.nn.functional.max_pool1d((~places)[None].float(), 2 * by + 1, 1, by)[0].bool()


def test_a_wave_of_another_rate_loses_the_same_tones() -> None:
    seconds = torch.arange(32_000) / 32_000
    tones = torch.stack([torch.sin(2 * np.pi * pitch * seconds) for pitch in (900.0, 1_100.0, 1_900.0, 2_100.0)])
    views = [SoundView(None, (1_000.0, 2_000.0))] * 4
    powers = mask_waves(tones, views, 32_000).square().mean(1)
    assert torch.allclose(powers, torch.tensor([0.5, 0.0, 0.0, 0.5]), atol=1e-5)


def test_a_view_without_bands_masks_nothing() -> None:
    uniforms = torch.tensor([[0.0, 0.5], [0.9, 0.5]])
    assert sound_views(uniforms[:1], ViewRecipe(), 160_000) == [SoundView(None, None)]  # of no width
    assert sound_views(uniforms[1:], ViewRecipe(None, None, None), 160_000) == [SoundView(None, None)]
    wave = torch.randn(1, 1_001, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mask_waves(wave, [SoundView(None, None)], 16_000), wave, atol=1e-6)


def test_bands_are_golden() -> None:
    # Width 0.5 * 192 = 96 frames from floor(0.25 * 905) = 226, and 12 bins from floor(0.25 * 52) = 13.
    (view,) = sound_views(torch.tensor([[0.5, 0.25]]), ViewRecipe(), 160_000)
    assert view.time == pytest.approx((0.2255, 0.3215))
    corners = mel_edges(64, 0, 8000)
    assert view.hertz == pytest.approx(((corners[13] + corners[14]) / 2, (corners[25] + corners[26]) / 2))
    (whole,) = sound_views(torch.tensor([[0.999, 0.5]]), ViewRecipe(time_mask=200, freq_mask=128), 16_000)
    assert whole == SoundView((0.0, 1.0), (0.0, 8000.0))


@settings(max_examples=25, deadline=None)
@given(u1=uniform, u2=uniform, samples=st.sampled_from([16_000, 31_000]))
def test_masked_waves_cover_the_seconds_and_hertz_of_the_student_within_a_bin(
    u1: float, u2: float, samples: int
) -> None:
    recipe, uniforms = ViewRecipe(time_mask=suited_time_mask(samples)), torch.tensor([[u1, u2]])
    (view,) = sound_views(uniforms, recipe, samples)
    wave = torch.randn(1, samples, generator=torch.Generator().manual_seed(2))
    silent = mask_waves(wave.abs() + 1, [SoundView(view.time, None)], 16_000)[0] < 1e-4
    spectrum = torch.fft.rfft(mask_waves(wave, [SoundView(None, view.hertz)], 16_000))[0].abs()
    removed = spectrum < 1e-2 * torch.fft.rfft(wave)[0].abs()
    ours = mask(torch.ones(1, 64, frames_of(samples)), uniforms, recipe)[0] == 0
    seconds, hertz = np.arange(frames_of(samples)) * 0.01, CENTRES.numpy()
    for axis, student, hidden, step in ((1, seconds, silent, 1 / 16_000), (0, hertz, removed, 16_000 / samples)):
        seen = extent(ours, axis)
        if seen is None:
            assert not hidden.any()
            continue
        places = hidden.nonzero().flatten()
        assert len(places) == places[-1] - places[0] + 1
        widths = np.diff(student)
        assert abs(float(places[0]) * step - student[seen[0]]) <= widths[max(seen[0] - 1, 0)] + step
        assert abs(float(places[-1]) * step - student[seen[1]]) <= widths[min(seen[1], len(widths) - 1)] + step
