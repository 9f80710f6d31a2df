"""Devices: which provider of ONNX Runtime an option means, and what runs there.

No accelerator is needed: stand-ins of ONNX Runtime's list of providers and of its session answer as the real ones do on
a machine that has one, and compute on the CPU.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from threading import Lock, current_thread
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ced.errors import CheckpointError, ConfigError
from ced.integrations.ray import Model
from ced.model import ort
from ced.model.loading import TorchScorer
from ced.model.runtime import OnnxModel, open_model
from ced.tag.tagger import Tagger

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
RealSession = ort.InferenceSession


class AcceleratedSession:
    """An `InferenceSession` on a machine with a GPU: takes its provider, counts calls, and computes on the CPU."""

    opened: list["AcceleratedSession"]
    usable = True  # False: the driver is missing, and ONNX Runtime uses the CPU without an error
    broken = False  # True: the provider raises

    def __init__(self, path: Path, options: Any, providers: Sequence[Any]) -> None:
        self.wanted = [each if isinstance(each, tuple) else (each, {}) for each in providers]
        self.options = options
        if self.broken and self.wanted[0][0] != CPU:
            raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version")
        self._real = RealSession(path, options, providers=[CPU])
        self._providers = [name for name, _ in self.wanted if self.usable or name == CPU]
        self._lock = Lock()
        self.shapes: list[tuple[int, ...]] = []
        self.threads: set[str] = set()
        type(self).opened.append(self)

    def get_providers(self) -> list[str]:
        return self._providers

    def disable_fallback(self) -> None:
        self._real.disable_fallback()

    def run(self, outputs: Any, inputs: dict[str, Any]) -> Any:
        if self._providers == [CPU]:
            self.shapes += [each.shape for each in inputs.values()]
            return self._real.run(outputs, inputs)
        assert self._lock.acquire(blocking=False), "two threads call it at once, which DirectML does not allow"
        try:
            self.shapes += [each.shape for each in inputs.values()]
            self.threads.add(current_thread().name)
            return self._real.run(outputs, inputs)
        finally:
            self._lock.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> type[AcceleratedSession]:
    """A machine with an NVIDIA GPU, two of them even, and the build of ONNX Runtime for it."""

    class Session(AcceleratedSession):
        opened: list[AcceleratedSession] = []  # noqa: RUF012

    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["TensorrtExecutionProvider", CUDA, CPU])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    return Session


def noise(clips: int, samples: int) -> Any:
    return np.random.default_rng(0).normal(0.0, 0.1, (clips, samples)).astype(np.float32)


def test_a_device_is_one_that_onnx_runtime_has() -> None:
    assert ort.available() == ["cpu"]
    assert ort.find_device(None) == ort.find_device("auto") == ort.find_device("CPU") == ort.CPU
    with pytest.raises(ConfigError, match=r"'cuda', which .* cannot use; available here: auto, cpu; .*onnxruntime-gpu"):
        ort.find_device("cuda")
    for wrong in ("gpu", "cpu:1", "cuda:x", "cuda:", ""):
        with pytest.raises(ConfigError, match="available here: auto, cpu"):
            ort.find_device(wrong)


@pytest.mark.parametrize(
    ("providers", "device"),
    [
        (["TensorrtExecutionProvider", CUDA, CPU], "cuda"),
        (["CoreMLExecutionProvider", "AzureExecutionProvider", CPU], "coreml"),
        (["DmlExecutionProvider", CPU], "directml"),
        (["AzureExecutionProvider", CPU], "cpu"),
    ],
)
def test_auto_is_an_accelerator_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, providers: list[str], device: str
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    assert ort.find_device("auto").name == device


def test_a_graph_runs_on_the_device_that_is_named(accelerated: type[AcceleratedSession], graph: Path) -> None:
    expected = OnnxModel(graph)
    assert not expected.accelerated
    model = open_model(graph, device="cuda:1")
    assert model.accelerated
    (name, settings), (rest, _) = accelerated.opened[-1].wanted
    assert (name, rest) == (CUDA, CPU)
    assert settings == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "device_id": "1"}
    waves = noise(5, 160_000)
    np.testing.assert_allclose(model(waves), expected(waves), atol=1e-6)
    assert accelerated.opened[-1].shapes == [(5, 160_000)]  # one call
    assert accelerated.opened[0].shapes == [(1, 160_000)] * 5


def test_directml_is_opened_as_its_documentation_asks(
    accelerated: type[AcceleratedSession], graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["DmlExecutionProvider", CPU])
    assert OnnxModel(graph, device="directml").accelerated
    options = accelerated.opened[-1].options
    assert not options.enable_mem_pattern
    assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL


@pytest.mark.parametrize("fault", ["usable", "broken"])
def test_a_device_without_its_driver_is_refused_or_for_auto_replaced(
    accelerated: type[AcceleratedSession], graph: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    setattr(accelerated, fault, fault == "broken")
    reason = "libraries are missing" if fault == "usable" else "CUDA driver version"
    with pytest.raises(ConfigError, match=f"device is 'cuda', but ONNX Runtime cannot use it: .*{reason}"):
        OnnxModel(graph, device="cuda")
    with caplog.at_level(logging.INFO, "ced"):
        model = OnnxModel(graph, device="auto")
    assert not model.accelerated
    assert "device cuda cannot be used, the CPU is" in caplog.text
    with pytest.raises(CheckpointError, match="damaged"):
        OnnxModel(_damaged(graph), device="cuda")


def _damaged(graph: Path) -> Path:
    path = graph.with_name("damaged.onnx")
    path.write_bytes(graph.read_bytes()[:1000])
    return path


def test_windows_of_many_sounds_share_calls(accelerated: type[AcceleratedSession], graph: Path, tmp_path: Path) -> None:
    paths = []
    for number, wave in enumerate(noise(40, 16_000)):
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], wave[: 16_000 if number % 4 else 8_000], 16_000)
    with Tagger(graph, jobs=2) as tagger:
        assert tagger.jobs == 2
        expected = list(tagger.tag_many(paths, window=1.0))
    with Tagger(graph, jobs=2, device="auto", batch=8) as tagger:
        assert tagger.jobs == 16
        found = list(tagger.tag_many(paths, window=1.0))
        session = accelerated.opened[-1]
    assert len(found) == len(expected) == 40
    for one, other in zip(found, expected, strict=True):
        assert [tag.label for tag in one[0].tags] == [tag.label for tag in other[0].tags]  # type: ignore[index]
        given = [tag.prob for tag in other[0].tags]  # type: ignore[index]
        assert [tag.prob for tag in one[0].tags] == pytest.approx(given, abs=1e-6)  # type: ignore[index]
    assert session.threads == {"accelerator"}
    assert sum(shape[0] for shape in session.shapes) == 40
    assert max(shape[0] for shape in session.shapes) <= 8
    assert len(session.shapes) < 40  # calls were shared
    lengths = {shape[1] for shape in session.shapes}
    assert lengths == {16_000, 8_000}  # never windows of two lengths in one


def test_windows_of_one_sound_share_calls(accelerated: type[AcceleratedSession], graph: Path) -> None:
    wave = noise(1, 40 * 16_000)[0]
    with Tagger(graph) as tagger:
        expected, vectors = tagger.tag((wave, 16_000), window=1.0), tagger.embed((wave, 16_000), window=1.0)
    with Tagger(graph, device="cuda", batch=16) as tagger:
        found, embedding = tagger.tag((wave, 16_000), window=1.0), tagger.embed((wave, 16_000), window=1.0)
        columns = tagger.tag((wave, 16_000), window=1.0, columns=True)
        shapes = accelerated.opened[-1].shapes
    assert [piece.start for piece in found] == [piece.start for piece in expected]
    for one, other in zip(found, expected, strict=True):
        assert [tag.prob for tag in one.tags] == pytest.approx([tag.prob for tag in other.tags], abs=1e-6)
    np.testing.assert_allclose(embedding.vectors, vectors.vectors, atol=1e-5)
    assert len(columns) == 40 * 6
    assert max(shape[0] for shape in shapes) <= 16
    assert len(shapes) < 3 * 40


def test_a_model_that_is_open_and_batches_out_of_range_are_refused(graph: Path) -> None:
    with pytest.raises(ConfigError, match="runs where it is"):
        Tagger(OnnxModel(graph), device="cuda")
    for batch in (0, 1_000_000):  # twice as many threads would read ahead
        with pytest.raises(ConfigError, match=f"batch is {batch}; it must be a whole number, 1 to 1024"):
            Tagger(graph, batch=batch)


def test_torch_networks_take_the_accelerator_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.local_hub import random_network

    network = random_network("ced_tiny")
    scorer = TorchScorer(network, "auto")
    assert scorer.network.freq_pos_embed.device.type == "cpu"
    assert not scorer.accelerated
    # "meta" is the one other device that a build for the CPU has.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    scorer = TorchScorer(network, "auto")
    assert scorer.network.freq_pos_embed.device.type == "meta"
    assert scorer.accelerated


def test_workers_of_a_cluster_take_a_gpu_for_cuda_only() -> None:
    assert [Model(device=device).on_gpu for device in (None, "cpu", "auto", "cuda", "cuda:0")] == [
        False, False, False, True, True,
    ]  # fmt: skip
