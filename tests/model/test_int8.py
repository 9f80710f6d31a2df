"""int8 graphs: what is in 8 bits, how close they are, and when they are refused."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch

from ced.errors import ConfigError, ExportError
from ced.model.config import ModelConfig
from ced.model.graph import GraphInput
from ced.model.graph import compare as compare_module
from ced.model.graph.compare import Comparison, export_int8
from ced.model.graph.export import export
from ced.model.loading import weights_of
from ced.model.metrics import Figures
from ced.model.runtime import OnnxModel
from ced.model.vit import CED
from ced.sound.labels import ClassTable

OWN = ClassTable(("low", "high"))


@pytest.fixture(scope="module")
def network() -> CED:
    torch.manual_seed(0)
    model = CED(ModelConfig(embed_dim=64, num_heads=1, depth=2, outputdim=2), OWN).eval()
    with torch.no_grad():
        model.outputlayer[1].weight.mul_(30.0)  # type: ignore[operator]
    return model


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Tones, low and high, with a table."""
    folder = tmp_path / "clips"
    folder.mkdir()
    lines = ["filename\tlabel"]
    for number in range(6):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 700 * number) / 16_000 * np.arange(8_000))
        soundfile.write(folder / f"{number}.wav", tone, 16_000)
        lines.append(f"{number}.wav\t{number // 3}")
    (folder / "meta.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("source", ["wave", "feats"])
def test_the_blocks_weights_are_in_8_bits(network: CED, source: GraphInput, tmp_path: Path) -> None:
    report = export(weights_of(network), tmp_path / "a.onnx", source)
    assert export_int8(report.path) is None
    made = onnx.load(tmp_path / "a.int8.onnx")
    weights = {tuple(each.dims): each for each in made.graph.initializer if each.data_type == onnx.TensorProto.INT8}
    assert {(64, 192), (64, 64), (64, 256), (256, 64)} < weights.keys()  # qkv, proj, fc1, fc2
    assert (64, 2) not in weights  # the output layer
    for shape in ((64, 192), (256, 64)):
        values = onnx.numpy_helper.to_array(weights[shape])
        assert -64 <= values.min() < -50  # 7 bits
        assert 50 < values.max() <= 64
    scales = [tuple(each.dims) for each in made.graph.initializer if "scale" in each.name]
    assert (192,) in scales  # one a channel
    float_graph = onnx.load(report.path)
    said = [{each.key: each.value for each in graph.metadata_props} for graph in (made, float_graph)]
    assert said[0] == (said[1] | {"precision": "int8"} if source == "wave" else said[1])
    assert made.ir_version == float_graph.ir_version
    domains = {each.domain for each in made.opset_import}
    assert domains == ({""} if source == "feats" else {"", "com.microsoft"})


def test_close_to_float(network: CED, tmp_path: Path) -> None:
    report = export(weights_of(network), tmp_path / "a.onnx")
    export_int8(report.path)
    waves = np.random.default_rng(0).normal(0, 0.1, (2, 20_000)).astype(np.float32)
    exact, int8 = OnnxModel(report.path), OnnxModel(tmp_path / "a.int8.onnx")
    assert 0 < np.abs(exact(waves) - int8(waves)).max() < 0.02
    np.testing.assert_array_equal(int8(waves), np.concatenate([int8(wave[None]) for wave in waves]))
    assert int8.columns(waves).shape == (2, 7, 2)
    assert int8.labels == OWN


def test_compared_on_clips(network: CED, clips: Path, tmp_path: Path) -> None:
    report = export(weights_of(network), tmp_path / "a.onnx")
    found = export_int8(report.path, check=clips, bound=100)
    assert found is not None
    assert found.clips == 6
    assert found.exact.accuracy is not None
    assert 0 < found.mean_change <= found.largest_change < 0.05
    assert found.summary.startswith(f"mAP {found.exact.map:.4f} -> {found.int8.map:.4f} (")


def test_refused_past_the_bound(network: CED, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = export(weights_of(network), tmp_path / "a.onnx")
    (tmp_path / "a.int8.onnx").write_bytes(b"of an earlier export")
    bad = Comparison(6, Figures(0.9, 1.0), Figures(0.89, 1.0), 0.01, 0.1)
    monkeypatch.setattr(compare_module, "compare", lambda *_: bad)
    with pytest.raises(ExportError, match=r"int8 loses 1\.00 points of mAP of .*a\.onnx; at most 0\.3 are allowed"):
        export_int8(report.path, check=clips)
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "clips"]
    assert export_int8(report.path, check=clips, bound=1.1) is bad


def test_a_bound_below_zero(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bound is -1"):
        export_int8(tmp_path / "a.onnx", bound=-1)


def test_the_figures_in_one_line() -> None:
    found = Comparison(80, Figures(0.9, 0.8), Figures(0.901, 0.7875), 0.00026, 0.0046)
    assert found.summary == (
        "mAP 0.9000 -> 0.9010 (+0.10 points), accuracy 0.8000 -> 0.7875; probabilities change by 0.00026 in the mean, "
        "0.0046 at most (80 clips)"
    )
    several = Comparison(80, Figures(0.9, None), Figures(0.9, None), 0.0, 0.0)
    assert several.summary.startswith("mAP 0.9000 -> 0.9000 (+0.00 points); ")
