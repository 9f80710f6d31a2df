"""ONNX graphs, run by ONNX Runtime and compared with their networks."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from ced import __version__
from ced.errors import ExportError
from ced.model.onnx import ExportReport, export_feats
from ced.model.vit import CED, ModelConfig
from ced.sound.labels import ClassTable

SMALL = ModelConfig(embed_dim=64, num_heads=1, depth=1, outputdim=3, target_length=96)
OWN = ClassTable(("dog", 'rain, "heavy"', "clock"))


def network(config: ModelConfig, labels: ClassTable | None = None) -> CED:
    """Make a network in eval mode with seeded random weights and statistics, and scores that are spread out."""
    generator = torch.Generator().manual_seed(0)
    model = CED(config, labels)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                scales = name.endswith("running_var") or (name.endswith("weight") and value.dim() == 1)
                value.copy_(0.1 * torch.randn(value.shape, generator=generator) + scales)
        model.state_dict()["init_bn.1.running_var"].fill_(225.0)
        model.state_dict()["init_bn.1.running_mean"].fill_(-30.0)
    return model.eval()


def mels(clips: int, frames: int) -> torch.Tensor:
    return 15.0 * torch.randn(clips, 64, frames, generator=torch.Generator().manual_seed(frames)) - 30.0


def run(path: Path, mel: torch.Tensor) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(["prob"], {"feats": mel.numpy()})
    return np.asarray(result)


def assert_agree(path: Path, model: CED, shapes: list[tuple[int, int]], tolerance: float = 1e-5) -> None:
    for clips, frames in shapes:
        mel = mels(clips, frames)
        with torch.inference_mode():
            expected = model.as_probs(model.forward_mel(mel)).numpy()
        assert expected.std() > 0.01
        np.testing.assert_allclose(run(path, mel), expected, atol=tolerance, err_msg=f"{clips} clips, {frames} frames")


@pytest.fixture(scope="module")
def tagger() -> CED:
    return network(ModelConfig(embed_dim=64, num_heads=1, depth=1))


@pytest.fixture(scope="module")
def report(tagger: CED, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_feats(tagger, tmp_path_factory.mktemp("onnx") / "new" / "ced_v0.1.onnx")


def test_what_is_written(report: ExportReport) -> None:
    folder = report.path.parent
    assert sorted(os.listdir(folder)) == ["ced_v0.1.int8.onnx", "ced_v0.1.onnx", "class_labels_indices.csv"]
    assert (report.int8_path, report.labels_path) == (
        folder / "ced_v0.1.int8.onnx",
        folder / "class_labels_indices.csv",
    )
    assert report.largest_difference < 1e-5
    assert report.int8_difference is not None
    assert 0 < report.int8_difference < 0.1


@pytest.mark.parametrize("int8", [False, True])
def test_the_interface(report: ExportReport, int8: bool) -> None:
    path = report.int8_path if int8 else report.path
    assert path is not None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (feats,), (prob,) = session.get_inputs(), session.get_outputs()
    assert (feats.name, feats.type, feats.shape) == ("feats", "tensor(float)", ["batch", 64, "time"])
    assert (prob.name, prob.type, prob.shape) == ("prob", "tensor(float)", ["batch", 527])
    assert session.get_modelmeta().custom_metadata_map == {
        "model_type": "CED",
        "version": __version__,
        "model_author": "ced",
        "url": "https://arxiv.org/abs/2308.11957",
    }
    graph = onnx.load(path)
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", 18)]  # plain operators only
    assert graph.ir_version == 8
    assert os.getcwd().encode() not in path.read_bytes()  # the exporter's notes hold paths


def test_scores_are_those_of_the_network(report: ExportReport, tagger: CED) -> None:
    assert_agree(report.path, tagger, [(1, 16), (2, 17), (5, 100), (1, 998), (3, 1001), (1, 1012)])
    assert_agree(report.path, tagger, [(2, 1013), (1, 1500), (2, 2024), (1, 2025)])  # cut and joined


def test_int8_has_the_products_but_the_last(report: ExportReport, tagger: CED) -> None:
    assert report.int8_path is not None
    assert_agree(report.int8_path, tagger, [(1, 16), (3, 1001), (1, 1500)], tolerance=0.1)
    graph = onnx.load(report.int8_path).graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 4  # qkv, proj, fc1 and fc2
    kinds = {tuple(each.dims): each.data_type for each in graph.initializer if len(each.dims) == 2}
    assert kinds == {
        (64, 192): onnx.TensorProto.INT8,
        (64, 64): onnx.TensorProto.INT8,
        (64, 256): onnx.TensorProto.INT8,
        (256, 64): onnx.TensorProto.INT8,
        (64, 527): onnx.TensorProto.FLOAT,
    }
    scales = [list(each.dims) for each in graph.initializer if "_scale" in each.name and each.dims]
    assert [192] in scales  # one a channel, not one a tensor


def test_the_class_table_beside_it(report: ExportReport) -> None:
    lines = report.labels_path.read_bytes().decode().split("\n")
    assert lines[:3] == [
        "index,mid,display_name",
        '0,/m/09x0r,"Speech"',
        '1,/m/05zppz,"Male speech, man speaking"',
    ]
    assert len(lines) == 529
    assert lines[-1] == ""


def test_frequency_wise_pooling_and_own_classes(tmp_path: Path) -> None:
    model = network(replace(SMALL, pooling="dm", eval_avg="max"), OWN).train()
    report = export_feats(model, tmp_path / "student.onnx")
    assert model.training
    model.eval()
    assert_agree(report.path, model, [(2, 96), (3, 40), (2, 250), (1, 192)])
    assert report.int8_path is not None
    graph = onnx.load(report.int8_path).graph  # here the output layer is a product over a sequence as well
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 4
    with report.labels_path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [["0", "", "dog"], ["1", "", 'rain, "heavy"'], ["2", "", "clock"]]


def test_logits_become_probabilities(tmp_path: Path) -> None:
    model = network(replace(SMALL, pooling="logit", activation="softmax"), OWN)
    report = export_feats(model, tmp_path / "a.onnx", int8=False)
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "class_labels_indices.csv"]
    assert (report.int8_path, report.int8_difference) == (None, None)
    assert_agree(report.path, model, [(2, 96), (3, 40), (2, 250)])
    np.testing.assert_allclose(run(report.path, mels(2, 40)).sum(1), 1.0, atol=1e-5)


def test_a_class_token_and_no_filling(tmp_path: Path) -> None:
    model = network(replace(SMALL, pooling="token", pad_last=False), OWN)
    report = export_feats(model, tmp_path / "a.onnx", int8=False)
    assert_agree(report.path, model, [(2, 96), (3, 40), (1, 16)])


def test_a_graph_that_answers_otherwise_is_not_handed_out(tmp_path: Path) -> None:
    model = network(SMALL, OWN)
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(ExportError, match=r"a\.onnx differs from the network by nan in probability; at most 0\.0001"):
        export_feats(model, tmp_path / "a.onnx")
    assert os.listdir(tmp_path) == []
