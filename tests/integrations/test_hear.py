"""Embeddings for benchmarks: the checks of the public validators of HEAR (2021.0.2) and X-ARES (0.1.3), and more."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ced.errors import AudioError, CheckpointError
from ced.integrations import hear
from ced.model import loading
from ced.model.config import ModelConfig
from ced.model.graph.export import export
from ced.model.loading import weights_of
from ced.model.runtime import OnnxModel
from ced.model.vit import CED
from ced.model.zoo import MODELS

SMALL = ModelConfig(embed_dim=64, num_heads=1, depth=1)


@pytest.fixture(scope="module")
def network() -> CED:
    torch.manual_seed(0)
    return CED(SMALL).eval()


def noise(clips: int, seconds: float) -> torch.Tensor:
    return torch.rand((clips, int(seconds * 16_000)), generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("size", ["ced_tiny", "ced_mini", "ced_small", "ced_base"])
def test_checks_of_the_hear_validator(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(MODELS[size].config.embed_dim, MODELS[size].config.num_heads, depth=1)
    monkeypatch.setattr(loading, "load_model", lambda name: {size: CED(config)}[name])
    model = hear.load_model(size)
    assert isinstance(model, nn.Module)
    assert model.sample_rate in (16_000, 22_050, 44_100, 48_000)
    assert isinstance(model.scene_embedding_size, int)
    assert isinstance(model.timestamp_embedding_size, int)
    embeddings, times = hear.get_timestamp_embeddings(noise(16, 2.0), model)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (16, 12, model.timestamp_embedding_size)
    assert times.shape == embeddings.shape[:2]
    assert torch.all(torch.abs(torch.diff(times) - 160.0) < 1e-3)  # even, in milliseconds
    scenes = hear.get_scene_embeddings(noise(8, 3.74), model)
    assert scenes.dtype == torch.float32
    assert scenes.shape == (8, model.scene_embedding_size)


def test_checks_of_the_xares_checker(network: CED) -> None:
    encoder = hear.CedEncoder(network)
    assert type(encoder).__name__.endswith("Encoder")
    assert isinstance(encoder, nn.Module)
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16_000, 64, 160.0)
    assert encoder(torch.randn(2, 50_000)).shape == (2, 50_000 // 2_560, 64)
    assert encoder(torch.randn(50_000)).shape == (1, 50_000 // 2_560, 64)


@pytest.mark.parametrize(
    "audio", [torch.zeros(1, 16_000, dtype=torch.int16), torch.zeros(1, 0), torch.zeros(1, 2, 16_000)]
)
def test_invalid_waves_are_refused(audio: torch.Tensor, network: CED) -> None:
    with pytest.raises(AudioError, match=r"audio is torch\.\w+ \(.*\); it must be floats"):
        hear.CedEncoder(network)(audio)


def test_a_16_bit_encoder_gets_float32_features(network: CED) -> None:
    half = hear.CedEncoder(copy.deepcopy(network)).bfloat16()
    expected = hear.CedEncoder(network)(noise(1, 1.0))
    torch.testing.assert_close(half(noise(1, 1.0)).float(), expected, atol=0.05, rtol=0.05)


def test_the_default_model(monkeypatch: pytest.MonkeyPatch, network: CED) -> None:
    monkeypatch.setattr(loading, "load_model", lambda name: {"ced_mini": network}[name])
    assert hear.load_model().network is network
    assert hear.CedEncoder().network is network


def test_a_checkpoint_is_loaded_by_its_path(tmp_path: Path, network: CED) -> None:
    loading.save(tmp_path / "mine.safetensors", network)
    model = hear.load_model(str(tmp_path / "mine.safetensors"))
    waves = noise(2, 1.0)
    expected = hear.get_scene_embeddings(waves, hear.CedEncoder(network))
    torch.testing.assert_close(hear.get_scene_embeddings(waves, model), expected)
    with pytest.raises(CheckpointError):
        hear.load_model(str(tmp_path / "nothing.safetensors"))


def test_scene_embeddings_are_those_of_ced_embed(tmp_path: Path, network: CED) -> None:
    export(weights_of(network), tmp_path / "mine.onnx")
    waves = noise(2, 3.0)
    expected = OnnxModel(tmp_path / "mine.onnx").embed(waves.numpy())
    found = hear.get_scene_embeddings(waves, hear.CedEncoder(network)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_timestamps_are_the_centres_of_columns(network: CED) -> None:
    waves = torch.zeros(1, 32_000)
    waves[:, 16_000:16_160] = noise(1, 0.01)  # between 1000 and 1010 ms
    model = hear.CedEncoder(network)
    _, times = hear.get_timestamp_embeddings(waves, model)
    assert times[0, :3].tolist() == [75.0, 235.0, 395.0]
    mel = network.front_end(waves)[0].amax(0)  # the loudest frames, 10 ms apart
    column = int(mel.argmax()) // 16
    assert abs(float(times[0, column]) - 1_005.0) <= 80.0


def test_columns_of_long_sounds_are_evenly_spaced(network: CED) -> None:
    model = hear.CedEncoder(network)
    waves = noise(1, 25.0)
    embeddings, times = hear.get_timestamp_embeddings(waves, model)
    assert embeddings.shape == (1, 2_501 // 16, 64)
    assert torch.all(torch.diff(times) == 160.0)
    mel = network.front_end(waves)
    second = network.patch_tokens(mel[..., 63 * 16 : 2 * 63 * 16]).mean(1)  # pieces of 63 columns are encoded alone
    torch.testing.assert_close(embeddings[:, 63:126], second)


def test_embeddings_do_not_depend_on_the_batch_or_the_mode(network: CED) -> None:
    model = hear.CedEncoder(network).train()
    waves = noise(20, 0.5)
    together = hear.get_scene_embeddings(waves, model)
    alone = torch.cat([hear.get_scene_embeddings(wave[None], model) for wave in waves])
    torch.testing.assert_close(together, alone)
    assert not together.requires_grad
    assert hear.get_scene_embeddings(noise(1, 0.01), model).shape == (1, 64)  # shorter than a patch
    nn.Linear(64, 2)(together).sum().backward()  # a probe learns from them
