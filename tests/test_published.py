"""The published weights against published values; without the internet, the same comparison with random weights."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

import ced
from ced.model import loading, runtime, zoo
from ced.model.graph import Precision
from ced.model.loading import TorchScorer
from ced.model.vit import CED
from ced.serve.server import ServerSettings, open_application
from tests.local_hub import LocalHub, published, random_network, running
from tests.serve.served import running as served

DATA = Path(__file__).parent / "data"
RATE = 16_000
LARGEST_DIFFERENCE = 1e-3  # in logits

Array = NDArray[np.float32]

# What ced_base is published to give for whole clips, computed with 16-bit weights.
TAGS = {
    "rooster": {
        "Chicken, rooster": 0.9175,
        "Fowl": 0.6804,
        "Crowing, cock-a-doodle-doo": 0.5920,
        "Cluck": 0.4662,
        "Bird": 0.3754,
    },
    "thunder": {
        "Thunderstorm": 0.8940,
        "Thunder": 0.8759,
        "Rain": 0.7708,
        "Rain on surface": 0.2243,
        "Raindrop": 0.1838,
    },
    "guitar": {
        "Music": 0.8389,
        "Guitar": 0.5285,
        "Musical instrument": 0.5231,
        "Plucked string instrument": 0.4708,
        "Acoustic guitar": 0.4555,
    },
}


def clips() -> dict[str, Array]:
    """Return the clips of the published logits, each padded to 10 s: (1, 160,000)."""

    def sine(hertz: float, seconds: float) -> Array:
        wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)
        return (np.round(wave * 32_767) / 32_768).astype(np.float32)  # as 16-bit samples

    noise, rate = soundfile.read(DATA / "published_logits" / "noise_10s.flac", dtype="float32")
    assert rate == RATE
    given = {
        "sine440_10s": sine(440, 10),
        "sine1000_3s": sine(1_000, 3),
        "silence_2s": np.zeros(2 * RATE, np.float32),
        "noise_10s": noise,
    }
    return {name: np.pad(wave, (0, 10 * RATE - len(wave)))[None] for name, wave in given.items()}


def network_logits(network: CED, wave: Array) -> Array:
    with torch.inference_mode():
        logits: Array = network.logits_mel(network.front_end(torch.from_numpy(wave)))[0].numpy()
    return logits


def graph_logits(model: runtime.OnnxModel, wave: Array) -> Array:
    probs = model(wave)[0].astype(np.float64)
    return np.asarray(np.log(probs / (1 - probs)), np.float32)


def compare_with_golden(name: str, golden: dict[str, Array]) -> None:
    """Check that network and graph of a published name give the golden logits for every clip."""
    network, graph = loading.load_model(name), runtime.open_model(name)
    assert network.labels == graph.labels == loading.load_model(name).labels
    for clip, wave in clips().items():
        for kind, found in (("network", network_logits(network, wave)), ("graph", graph_logits(graph, wave))):
            difference = float(np.abs(found - golden[clip]).max())
            assert difference <= LARGEST_DIFFERENCE, f"{name}, {clip}: the {kind} differs by {difference:.2g}"


@pytest.mark.network
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_the_published_weights_have_the_published_logits(size: str) -> None:
    with np.load(DATA / "published_logits" / f"{size}.npz") as stored:
        compare_with_golden(f"ced_{size}", dict(stored))


@pytest.mark.network
@pytest.mark.parametrize("clip", TAGS)
def test_ced_base_has_the_published_tags(clip: str) -> None:
    with ced.Tagger("ced_base") as tagger:
        (window,) = tagger.tag(DATA / "clips" / f"{clip}.flac", top_k=len(TAGS[clip]))
    found = {tag.label: tag.prob for tag in window.tags}
    assert found == pytest.approx(TAGS[clip], abs=0.02)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CED]:
    """A hub on this machine with a `ced_tiny` of random weights; returns that network."""
    monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("CED_OFFLINE", raising=False)
    network = random_network("ced_tiny")
    with running(LocalHub()) as site:
        monkeypatch.setattr(zoo, "MODELS", published(site, {"ced_tiny": network}))
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        yield network


def test_the_comparison_passes_for_right_values_and_fails_for_wrong_ones(hub: CED) -> None:
    golden = {name: network_logits(hub, wave) for name, wave in clips().items()}
    compare_with_golden("ced_tiny", golden)
    for clip in golden:
        wrong = golden | {clip: golden[clip] + np.float32(3e-3) * (np.arange(527) == 500)}
        with pytest.raises(AssertionError, match=f"ced_tiny, {clip}: the network differs by 0.003"):
            compare_with_golden("ced_tiny", wrong)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_server_returns_scores_and_embeddings_of_a_published_name(hub: CED, precision: Precision) -> None:
    wave = clips()["noise_10s"]
    settings = ServerSettings("ced_tiny", "ced_tiny", precision=precision)
    with (
        served(open_application(settings)) as address,
        httpx.Client(base_url=address, timeout=120) as client,
    ):
        answer = client.post(
            "/v1/audio/classification",
            content=(wave[0] * 32_768).astype("<i2").tobytes(),
            headers={"content-type": "audio/pcm; rate=16000"},
            params={"top_k": 527, "embeddings": "clip", "window": 30},
        )
    assert answer.status_code == 200, answer.text
    found, scorer = answer.json(), TorchScorer(hub)
    probs = {tag["index"]: tag["prob"] for tag in found["pieces"][0]["tags"]}
    expected = scorer(wave)[0]
    close = 1e-5 if precision == "float32" else 0.05
    assert [probs[index] for index in range(527)] == pytest.approx(expected.tolist(), abs=close)
    assert (max(abs(probs[index] - expected[index]) for index in range(527)) > 1e-4) == (precision == "int8")
    np.testing.assert_allclose(found["embeddings"][0]["vector"], scorer.embed(wave)[0], atol=20 * close)
