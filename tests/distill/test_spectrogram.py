"""Spectrograms by settings: against other implementations, and where their frames and bands lie."""

from typing import Any

import numpy as np
import pytest
import torch

from ced.config import check
from ced.distill.spectrogram import FeatureSettings, Spectrogram, resample
from ced.errors import ConfigError
from ced.model.frontend import LogMel

MEL = {"bands": 64, "high": 8000}
CED = {"window": 512, "fft": 512, "hop": 160, "mel": MEL, "log": {"form": "decibel", "floor": 1e-10}}


def spectrogram(rate: int = 16_000, **changes: Any) -> Spectrogram:
    return Spectrogram(check(FeatureSettings, CED | changes, "test"), rate)


def noise(samples: int, clips: int = 3) -> torch.Tensor:
    return torch.randn(clips, samples, generator=torch.Generator().manual_seed(0)) * 0.1


def test_settings_can_describe_the_features_of_ced() -> None:
    waves = noise(16_000)
    assert torch.allclose(spectrogram()(waves), LogMel()(waves), atol=1e-3)


def test_kaldi_features_are_those_of_the_extractor_of_ast() -> None:
    from transformers import ASTFeatureExtractor

    waves = noise(16_000)
    extractor = ASTFeatureExtractor(max_length=110, num_mel_bins=64)
    expected = extractor(list(waves.numpy()), sampling_rate=16_000, return_tensors="pt")["input_values"]
    ours = spectrogram(
        framing="kaldi",
        pre_emphasis=0.97,
        window=400,
        window_form="hann_symmetric",
        mel=MEL | {"low": 20, "scale": "kaldi"},
        log={"floor": float(np.finfo(np.float32).eps)},
        mean=extractor.mean,
        std=2 * extractor.std,
        frames=110,
        fill=-extractor.mean / (2 * extractor.std),
    )
    assert ours.frames_of(16_000) == 98
    assert torch.allclose(ours(waves).mT, expected, atol=1e-4)


@pytest.mark.parametrize("settings", [{"scale": "slaney", "area_norm": True}, {"scale": "kaldi", "low": 50}, {}])
def test_filters_are_those_of_transformers(settings: dict[str, Any]) -> None:
    from transformers.audio_utils import mel_filter_bank

    filters = spectrogram(32_000, fft=1024, mel={"bands": 40, "high": 14_000} | settings).filters
    scale = settings.get("scale", "htk")
    expected = mel_filter_bank(
        num_frequency_bins=513,
        num_mel_filters=40,
        min_frequency=settings.get("low", 0),
        max_frequency=14_000,
        sampling_rate=32_000,
        norm="slaney" if settings.get("area_norm") else None,
        mel_scale=scale,
        triangularize_in_mel_space=scale == "kaldi",
    )
    np.testing.assert_allclose(filters, expected.T, atol=2e-6)


@pytest.mark.parametrize("framing", ["centred", "plain", "kaldi"])
@pytest.mark.parametrize("rate", [16_000, 32_000])
def test_frames_and_bands_lie_where_the_settings_put_them(framing: str, rate: int) -> None:
    ours = spectrogram(rate, framing=framing, window=400, hop=rate // 100)
    samples = rate // 2
    click, seconds = torch.zeros(1, samples), torch.arange(samples) / rate
    click[0, samples // 3] = 1.0
    frame = int(ours(click)[0].sum(0).argmax())
    times = ours.times(ours.frames_of(samples), samples)
    assert len(times) == ours(click).shape[2]
    assert abs(float(times[frame]) - 1 / 3) * 0.5 <= 0.01
    band = int(ours(torch.sin(2 * np.pi * 1_500 * seconds)[None])[0].mean(1).argmax())
    assert abs(float(ours.hertz[band]) - 1_500) <= float(ours.hertz[band + 1] - ours.hertz[band - 1]) / 2


def test_pre_emphasis_of_the_wave_leaves_out_the_first_sample() -> None:
    waves = noise(1_601)
    emphasised = waves[:, 1:] - 0.9 * waves[:, :-1]
    ours = spectrogram(pre_emphasis=0.9)
    assert torch.equal(ours(waves), spectrogram()(emphasised))
    assert ours.frames_of(1_601) == ours(waves).shape[2] == 11
    assert ours.frames_of(1_600) == ours(waves[:, :1_600]).shape[2] == 10


def test_short_inputs_are_padded_with_the_fill() -> None:
    ours = spectrogram(mean=-4.0, std=2.0, frames=20)
    features = ours(noise(1_600))
    assert features.shape == (3, 64, 20)
    assert torch.allclose(features[:, :, 11:], torch.tensor(-48.0))  # of silence, -100 dB
    assert spectrogram(fill=0.5, frames=20)(noise(1_600))[:, :, 11:].eq(0.5).all()
    with pytest.raises(ConfigError, match=r"1 s has 101 frames; at most 20"):
        ours.check(16_000)
    with pytest.raises(ConfigError, match="shorter than one frame"):
        ours.check(256)


def test_resampled_waves_keep_their_tones() -> None:
    tone = torch.sin(2 * np.pi * 1_000 * torch.arange(16_000) / 16_000)
    expected = torch.sin(2 * np.pi * 1_000 * torch.arange(32_000) / 32_000)
    doubled = resample(torch.stack([tone, tone / 2]), 16_000, 32_000)
    assert doubled.shape == (2, 32_000)
    assert torch.allclose(doubled[:, 500:-500], torch.stack([expected, expected / 2])[:, 500:-500], atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"windw": 400}, r"windw: unknown key; did you mean window"),
        ({"window": 600}, r"window 600 is longer than fft 512"),
        ({"log": {}}, r"logarithm of silence"),
        ({"mel": {"bands": 64, "low": 9000, "high": 8000}}, r"low 9000 is not below high 8000"),
        ({"mel": {"bands": 64}}, r"mel\.high: required"),
        ({"framing": "reflect"}, r"framing: input should be 'centred', 'plain' or 'kaldi'"),
        ({"std": 0}, r"std: .*greater than 0"),
    ],
)
def test_wrong_settings_are_explained(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        spectrogram(**changes)
