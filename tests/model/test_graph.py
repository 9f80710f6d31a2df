"""Exported graphs, run by ONNX Runtime and compared with their networks."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from ced import __version__
from ced.errors import CheckpointError, ExportError
from ced.model.config import ModelConfig
from ced.model.frontend import LogMel
from ced.model.graph.export import ExportReport, export, write_graph
from ced.model.graph.network import front_end_graph
from ced.model.loading import weights_of
from ced.model.ort import InferenceSession
from ced.model.runtime import OnnxModel
from ced.model.vit import CED
from ced.sound.audio import load
from ced.sound.features import PUBLISHED as PUBLISHED_FEATURES
from ced.sound.labels import ClassTable

SMALL = ModelConfig(embed_dim=64, num_heads=1, depth=1, outputdim=3, target_length=96)
OWN = ClassTable(("dog", 'rain, "heavy"', "clock"))
PUBLISHED = {
    "model_type": "CED",
    "version": __version__,
    "model_author": "ced",
    "url": "https://arxiv.org/abs/2308.11957",
}


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


def waves(clips: int, samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(samples))


def mels(clips: int, frames: int) -> torch.Tensor:
    return 15.0 * torch.randn(clips, 64, frames, generator=torch.Generator().manual_seed(frames)) - 30.0


def run(path: Path, output: str, batch: torch.Tensor) -> NDArray[np.float32]:
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run([output], {session.get_inputs()[0].name: batch.numpy()})
    return np.asarray(result)


def assert_agree(path: Path, model: CED, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        with torch.inference_mode():
            scores = model.probs(batch) if batch.dim() == 2 else model.as_probs(model.forward_mel(batch))
        expected = scores.numpy()
        assert expected.std() > 0.01
        np.testing.assert_allclose(run(path, "prob", batch), expected, atol=1e-5, err_msg=str(batch.shape))


@pytest.fixture(scope="module")
def tagger() -> CED:
    return network(ModelConfig(embed_dim=64, num_heads=1, depth=2))


@pytest.fixture(scope="module")
def report(tagger: CED, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export(weights_of(tagger), tmp_path_factory.mktemp("wave") / "new" / "ced_v0.1.onnx")


@pytest.fixture(scope="module")
def feats(tagger: CED, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export(weights_of(tagger), tmp_path_factory.mktemp("feats") / "new" / "ced_v0.1.onnx", "feats")


class TestWave:
    def test_the_exported_files(self, report: ExportReport) -> None:
        assert os.listdir(report.path.parent) == ["ced_v0.1.onnx"]
        assert report.labels_path is None
        assert report.largest_difference is not None
        assert report.largest_difference < 1e-5

    def test_the_interface(self, report: ExportReport, tagger: CED) -> None:
        session = InferenceSession(report.path, providers=["CPUExecutionProvider"])
        found = [(each.name, each.type, each.shape) for each in (*session.get_inputs(), *session.get_outputs())]
        assert found == [
            ("waves", "tensor(float)", ["batch", "time"]),
            ("prob", "tensor(float)", ["batch", 527]),
            ("embedding", "tensor(float)", ["batch", 64]),
            ("columns", "tensor(float)", ["batch", "columns", 527]),
        ]
        said = session.get_modelmeta().custom_metadata_map
        classes = json.loads(said.pop("classes"))
        assert (tuple(classes["names"]), tuple(classes["mids"])) == (tagger.labels.names, tagger.labels.mids)
        front_end = '{"n_mels": 64, "n_fft": 512, "win_size": 512, "hop_size": 160, "f_min": 0.0, "f_max": 8000.0}'
        assert said == PUBLISHED | {
            "output": "probabilities",
            "precision": "float32",
            "sample_rate": "16000",
            "hop": "160",
            "piece": "1012",
            "preprocessing": front_end,
        }
        assert os.getcwd().encode() not in report.path.read_bytes()

    def test_scores_are_those_of_the_network(self, report: ExportReport, tagger: CED) -> None:
        lengths = [1, 1_600, 2_399, 2_400, 2_559, 2_560, 16_000, 160_000, 161_919, 161_920, 323_840, 65 * 16_000]
        assert_agree(report.path, tagger, [waves(1, length) for length in lengths])
        assert_agree(report.path, tagger, [waves(5, 1_600), waves(3, 20_001), waves(2, 170_000)])

    def test_a_clip_does_not_depend_on_its_neighbours(self, report: ExportReport) -> None:
        batch = waves(4, 20_000)
        alone = np.concatenate([run(report.path, "prob", wave[None]) for wave in batch])
        np.testing.assert_allclose(run(report.path, "prob", batch), alone, atol=1e-6)

    def test_silence_and_full_scale(self, report: ExportReport, tagger: CED) -> None:
        square = torch.sign(torch.sin(torch.arange(20_000) / 40.0))[None]
        for batch in (torch.zeros(1, 20_000), square, torch.cat([square, torch.zeros(1, 20_000)], 1)):
            with torch.inference_mode():
                expected = tagger.probs(batch).numpy()
            np.testing.assert_allclose(run(report.path, "prob", batch), expected, atol=1e-5)

    def test_embeddings_are_the_mean_of_the_tokens(self, report: ExportReport, tagger: CED) -> None:
        batch = waves(2, 20_000)
        with torch.inference_mode():
            expected = tagger._encode(tagger.init_bn(tagger.front_end(batch))).mean(1).numpy()
        np.testing.assert_allclose(run(report.path, "embedding", batch), expected, atol=1e-5)
        assert run(report.path, "embedding", waves(2, 400_000)).shape == (2, 64)

    def test_columns_are_scored_one_by_one(self, report: ExportReport, tagger: CED) -> None:
        batch = waves(2, 20_000)
        with torch.inference_mode():
            tokens = tagger._encode(tagger.init_bn(tagger.front_end(batch)))
            expected = tagger.outputlayer(tokens.unflatten(1, (4, -1)).mean(1)).sigmoid().numpy()
        assert expected.shape == (2, 7, 527)  # 126 frames
        np.testing.assert_allclose(run(report.path, "columns", batch), expected, atol=1e-5)

    @pytest.mark.parametrize(("frames", "columns"), [(16, 1), (1_012, 63), (1_013, 63), (1_028, 64), (2_100, 130)])
    def test_columns_without_the_padding(self, report: ExportReport, frames: int, columns: int) -> None:
        assert run(report.path, "columns", waves(1, (frames - 1) * 160)).shape == (1, columns, 527)

    @pytest.mark.parametrize(
        "changes",
        [
            {"pooling": "dm", "eval_avg": "max"},
            {"pooling": "logit", "activation": "softmax"},
            {"pooling": "token"},
            {"init_bn": False, "num_heads": 2},
            {"n_mels": 32, "win_size": 400, "f_min": 50.0, "hop_size": 128},
        ],
        ids=str,
    )
    def test_other_settings(self, changes: dict[str, Any], tmp_path: Path) -> None:
        model = spread(replace(SMALL, **changes))
        found = export(weights_of(model), tmp_path / "a.onnx")
        assert_agree(found.path, model, [waves(2, 20_000), waves(1, 5_000), waves(2, 40_000)])

    def test_the_network_is_not_changed(self, tmp_path: Path) -> None:
        model = network(SMALL, OWN).train()
        export(weights_of(model), tmp_path / "a.onnx")
        assert model.training

    def test_a_front_end_that_cannot_be_exported(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="only a centred front end"):
            export(weights_of(network(replace(SMALL, center=False), OWN)), tmp_path / "a.onnx")


def spread(config: ModelConfig) -> CED:
    """A network on raw decibels, if it has no BatchNorm, all the same with scores that are spread out."""
    return network(config, OWN) if config.init_bn else network_without_norm(config)


def network_without_norm(config: ModelConfig) -> CED:
    torch.manual_seed(0)
    model = CED(config, OWN).eval()
    with torch.no_grad():
        model.outputlayer[1].weight.mul_(30.0)  # type: ignore[operator]
    return model


def test_weights_without_an_output_layer_only_embed(tmp_path: Path, tagger: CED) -> None:
    weights = weights_of(tagger)
    arrays = {name: value for name, value in weights.arrays.items() if not name.startswith("outputlayer.")}
    pretrained = replace(weights, arrays=arrays | {"mask_token": np.zeros((1, 1, 8), np.float32)}, source="mae.pt")
    write_graph(pretrained, tmp_path / "a.onnx")
    model, batch = OnnxModel(tmp_path / "a.onnx"), waves(1, 20_000)
    np.testing.assert_array_equal(model.embed(batch.numpy()), run(tmp_path / "a.onnx", "embedding", batch))
    for score in (model, model.columns):
        with pytest.raises(CheckpointError, match="no output layer"):
            score(batch.numpy())
    with pytest.raises(CheckpointError, match=r"mae\.pt has no output layer"):
        export(pretrained, tmp_path / "b.onnx", "feats")


class TestFrontEnd:
    @pytest.mark.parametrize("samples", [1_000, 2_400, 16_000, 160_000])
    def test_the_graph_is_the_front_end(self, samples: int, tmp_path: Path) -> None:
        path = tmp_path / "front_end.onnx"
        onnx.save(front_end_graph(PUBLISHED_FEATURES), path)
        batch = waves(2, samples)
        padded = torch.nn.functional.pad(batch, (0, max(0, 2_400 - samples)))
        np.testing.assert_allclose(run(path, "feats", batch), LogMel()(padded).numpy(), atol=1e-3)


class TestFeats:
    def test_the_exported_files(self, feats: ExportReport) -> None:
        folder = feats.path.parent
        assert sorted(os.listdir(folder)) == ["ced_v0.1.onnx", "class_labels_indices.csv"]
        assert feats.labels_path == folder / "class_labels_indices.csv"
        assert feats.largest_difference is not None
        assert feats.largest_difference < 1e-5

    def test_the_interface(self, feats: ExportReport) -> None:
        session = InferenceSession(feats.path, providers=["CPUExecutionProvider"])
        (source,), (prob,) = session.get_inputs(), session.get_outputs()
        assert (source.name, source.type, source.shape) == ("feats", "tensor(float)", ["batch", 64, "time"])
        assert (prob.name, prob.type, prob.shape) == ("prob", "tensor(float)", ["batch", 527])
        assert session.get_modelmeta().custom_metadata_map == PUBLISHED
        made = onnx.load(feats.path)
        assert [(each.domain, each.version) for each in made.opset_import] == [("", 18)]  # plain operators only
        assert made.ir_version == 8

    def test_scores_are_those_of_the_network(self, feats: ExportReport, tagger: CED) -> None:
        assert_agree(feats.path, tagger, [mels(1, 16), mels(2, 17), mels(5, 100), mels(1, 998), mels(3, 1_001)])
        assert_agree(feats.path, tagger, [mels(2, 1_013), mels(1, 1_500), mels(2, 2_024), mels(1, 2_025)])

    def test_the_class_table_beside_it(self, feats: ExportReport) -> None:
        assert feats.labels_path is not None
        lines = feats.labels_path.read_bytes().decode().split("\n")
        assert lines[:3] == [
            "index,mid,display_name",
            '0,/m/09x0r,"Speech"',
            '1,/m/05zppz,"Male speech, man speaking"',
        ]
        assert len(lines) == 529
        assert lines[-1] == ""

    def test_own_classes(self, tmp_path: Path) -> None:
        found = export(weights_of(network(SMALL, OWN)), tmp_path / "a.onnx", "feats")
        assert found.labels_path is not None
        with found.labels_path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        assert rows == [["0", "", "dog"], ["1", "", 'rain, "heavy"'], ["2", "", "clock"]]

    def test_the_class_table_of_another_model_is_not_overwritten(self, tmp_path: Path) -> None:
        export(weights_of(network(SMALL, OWN)), tmp_path / "a.onnx", "feats")
        export(weights_of(network(SMALL, OWN)), tmp_path / "b.onnx", "feats")  # the same classes
        before = (tmp_path / "class_labels_indices.csv").read_bytes()
        other = ClassTable(("dog", "rain", "clock"))
        with pytest.raises(ExportError, match=r"class_labels_indices\.csv belongs to a model with other classes"):
            export(weights_of(network(SMALL, other)), tmp_path / "c.onnx", "feats")
        assert (tmp_path / "class_labels_indices.csv").read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["a.onnx", "b.onnx", "class_labels_indices.csv"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"pooling": "dm", "eval_avg": "max"},
            {"pooling": "logit", "activation": "softmax"},
            {"pooling": "token", "num_heads": 2},
        ],
        ids=str,
    )
    def test_other_settings(self, changes: dict[str, Any], tmp_path: Path) -> None:
        model = network(replace(SMALL, **changes), OWN)
        found = export(weights_of(model), tmp_path / "a.onnx", "feats")
        assert_agree(found.path, model, [mels(2, 96), mels(3, 40), mels(2, 250), mels(1, 192)])

    def test_features_of_another_kind(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="hop_size 128 instead of 160"):
            export(weights_of(network(replace(SMALL, hop_size=128), OWN)), tmp_path / "a.onnx", "feats")

    def test_no_filling(self, tmp_path: Path) -> None:
        model = network(replace(SMALL, pad_last=False), OWN)
        found = export(weights_of(model), tmp_path / "a.onnx", "feats")
        assert_agree(found.path, model, [mels(2, 96), mels(3, 40), mels(1, 16)])


def test_sherpa_onnx_gives_the_same_tags(tmp_path: Path) -> None:
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    model = network(ModelConfig(embed_dim=64, num_heads=1, depth=2))
    found = export(weights_of(model), tmp_path / "a.onnx", "feats")
    config = sherpa_onnx.AudioTaggingConfig(
        model=sherpa_onnx.AudioTaggingModelConfig(ced=str(found.path), num_threads=1),
        labels=str(found.labels_path),
        top_k=5,
    )
    tagging = sherpa_onnx.AudioTagging(config)
    time_axis = np.arange(5 * 16_000) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * 440 * time_axis) * (1 + np.sin(2 * np.pi * 3 * time_axis)) / 2
    sounds = [(tone + np.random.default_rng(0).normal(0, 0.01, tone.shape)).astype(np.float32)]
    if "CED_ESC10" in os.environ:
        sounds += [load(path) for path in sorted(Path(os.environ["CED_ESC10"], "audio").glob("*.ogg"))[::80]]
    for wave in sounds:
        stream = tagging.create_stream()
        stream.accept_waveform(sample_rate=16_000, waveform=wave)
        theirs = {event.index: event.prob for event in tagging.compute(stream)}
        with torch.inference_mode():
            ours = model.probs(torch.from_numpy(wave)[None])[0]
        # Its features differ a little: neighbours in rank may change places.
        assert len(set(ours.topk(5).indices.tolist()) & theirs.keys()) >= 4
        assert all(abs(prob - ours[index]) < 0.05 for index, prob in theirs.items())


def test_a_graph_that_differs_from_the_network_is_not_written(tmp_path: Path) -> None:
    model = network(SMALL, OWN)
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(ExportError, match=r"a\.onnx differs from the network by nan in probability; at most 0\.0001"):
        export(weights_of(model), tmp_path / "a.onnx")
    assert os.listdir(tmp_path) == []
