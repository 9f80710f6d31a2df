"""The log-mel front end against golden values and against a second derivation of its definition."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ced.model.frontend import LogMel
from ced.sound.features import PUBLISHED, frames_of, mel_filters


def golden_wave() -> NDArray[np.float32]:
    """One second: a chirp from 100 to 7,100 Hz under noise (MT19937, whose stream is fixed), then 0.3 s of silence."""
    t = np.arange(16_000) / 16_000
    noise = np.random.RandomState(7).uniform(-1.0, 1.0, 16_000)
    wave = 0.6 * np.sin(2.0 * np.pi * (100.0 * t + 3_500.0 * t * t)) + 0.01 * noise
    return np.where(t < 0.7, wave, 0.0).astype(np.float32)


# Made once with torchaudio 2.11.0: AmplitudeToDB(top_db=120)(MelSpectrogram(16000, n_fft=512, win_length=512,
# hop_length=160, f_min=0, f_max=8000, n_mels=64, center=True, power=2.0)(wave)), wave from `golden_wave`.
GOLDEN_BINS = (0, 7, 20, 41, 63)
GOLDEN_FRAMES = (0, 1, 33, 68, 70, 71, 100)
GOLDEN = (
    (29.8650, 18.9339, -23.0298, -19.7531, -18.5664, -26.5531, -81.2533),
    (15.6587, 24.8619, -26.1067, -25.7401, -13.6439, -23.8030, -81.2533),
    (-4.9259, -14.1200, -18.6221, -21.9722, -10.9982, -21.3710, -81.2533),
    (-21.8010, -17.5696, -19.1254, -15.0172, -2.1703, -12.5151, -81.2533),
    (-13.4109, -13.1206, -11.4577, -11.6487, 3.5272, -6.6726, -81.2533),
)


def second_derivation(wave: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute the features in float64, one frame and one filter at a time, from the definition alone."""
    padded = np.pad(wave.astype(np.float64), 256, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(512) / 512)
    frames = [padded[start : start + 512] * hann for start in range(0, len(wave) + 1, 160)]
    power = np.abs(np.fft.rfft(frames)) ** 2  # (n, 257)
    top = 2595.0 * math.log10(1.0 + 8000.0 / 700.0)
    edges = [700.0 * (10.0 ** (top * index / 65.0 / 2595.0) - 1.0) for index in range(66)]
    bins = np.arange(257) * 31.25
    mel = [
        power @ np.interp(bins, [low, centre, high], [0.0, 1.0, 0.0])
        for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False)
    ]
    decibels = 10.0 * np.log10(np.maximum(mel, 1e-10))
    return np.asarray(np.maximum(decibels, decibels.max() - 120.0))


def test_golden_values() -> None:
    mel = LogMel()(torch.from_numpy(golden_wave())[None])[0]
    assert mel.shape == (64, 101)
    found = mel[list(GOLDEN_BINS)][:, list(GOLDEN_FRAMES)]
    torch.testing.assert_close(found, torch.tensor(GOLDEN), atol=1e-4, rtol=0)
    assert mel.double().sum().item() == pytest.approx(-216029.577, abs=0.05)
    assert mel.max().item() == pytest.approx(38.7467, abs=1e-4)
    assert mel.min().item() == pytest.approx(-81.2533, abs=1e-4)  # 120 dB below the maximum


@pytest.mark.parametrize("samples", [2_400, 2_401, 2_559, 2_560, 16_000])
def test_matches_a_second_derivation(samples: int) -> None:
    wave = golden_wave()[:samples]
    mel = LogMel()(torch.from_numpy(wave)[None])[0]
    assert mel.shape == (64, frames_of(samples))
    torch.testing.assert_close(mel.double(), torch.from_numpy(second_derivation(wave)), atol=2e-3, rtol=0)


def test_number_of_frames() -> None:
    assert [frames_of(samples) for samples in (0, 159, 160, 2_400, 160_000)] == [1, 1, 2, 16, 1_001]


def test_silence_is_the_floor() -> None:
    assert torch.equal(LogMel()(torch.zeros(1, 4_000)), torch.full((1, 64, 26), -100.0))


def test_filters_are_triangles_on_the_mel_scale() -> None:
    filters = mel_filters(PUBLISHED)
    assert filters.shape == (64, 257)
    assert filters.min() == 0.0
    # Between the tops of the first and the last filter the triangles add up to one.
    assert np.allclose(filters.sum(0)[3:245], 1.0, atol=1e-5)
    peaks = filters.argmax(1) * 31.25
    assert [round(float(peaks[index])) for index in (20, 41, 63)] == [875, 2875, 7656]


def test_each_clip_has_the_bits_it_has_alone() -> None:
    front_end = LogMel()
    generator = torch.Generator().manual_seed(3)
    loudness = torch.tensor([1.0, 1e-4, 0.0, 0.3, 1e-7])[:, None]
    waves = loudness * (torch.rand(5, 16_000, generator=generator) - 0.5)
    alone = torch.cat([front_end(wave[None]) for wave in waves])
    assert torch.equal(front_end(waves), alone)
    assert torch.equal(front_end(waves[[4, 2, 0]]), alone[[4, 2, 0]])
    quiet = alone[1]
    assert quiet.max() < -40.0  # a clip is not clamped at the level of its loud neighbour
    assert len(quiet.unique()) > 1_000


def test_stays_float32_under_autocast() -> None:
    front_end = LogMel()
    waves = torch.from_numpy(golden_wave())[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mel = front_end(waves)
        from_half = front_end(waves.bfloat16())
    assert mel.dtype == from_half.dtype == torch.float32
    assert torch.equal(mel, front_end(waves))


def test_window_and_filters_are_not_in_checkpoints() -> None:
    assert LogMel().state_dict() == {}
