"""The runtime, over graphs of ours and of others, and how a name or a path becomes one."""

import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ced.errors import CheckpointError, ConfigError, DownloadError
from ced.model import loading, zoo
from ced.model.config import ModelConfig
from ced.model.frontend import LogMel
from ced.model.graph.export import export
from ced.model.loading import TorchScorer, weights_of
from ced.model.runtime import OnnxModel, open_model
from ced.model.vit import CED
from ced.sound.audio import load
from ced.sound.labels import ClassTable, audioset
from tests.local_hub import LocalHub, published, random_network, running

HUB_CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
SMALL = ModelConfig(embed_dim=64, num_heads=1, depth=2, outputdim=3)
OWN = ClassTable(("dog", "rain", "clock"), ("/m/1", "/m/2", "/m/3"))
Waves = NDArray[np.float32]


def noise(clips: int, samples: int) -> Waves:
    return np.random.default_rng(samples).normal(0.0, 0.1, (clips, samples)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> CED:
    torch.manual_seed(0)
    model = CED(SMALL, OWN).eval()
    with torch.no_grad():
        model.outputlayer[1].weight.mul_(30.0)  # type: ignore[operator]
    return model


@pytest.fixture(scope="module")
def graph(network: CED, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(weights_of(network), tmp_path_factory.mktemp("graph") / "small.onnx").path


def foreign(path: Path, kind: str, shape: list[int | str], classes: int = 3) -> Path:
    """Write a graph that scores class i by i + the mean of its input, as "logits" or as "probabilities"."""
    axes = numpy_helper.from_array(np.arange(1, len(shape)), "axes")
    offsets = numpy_helper.from_array(np.arange(classes, dtype=np.float32)[None] - 1, "offsets")
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=len(shape) == 2)]
    if len(shape) == 3:
        nodes.append(helper.make_node("Unsqueeze", ["mean", "one"], ["column"]))
    logits = "column" if len(shape) == 3 else "mean"
    nodes.append(helper.make_node("Add", [logits, "offsets"], ["y" if kind == "logits" else "z"]))
    if kind == "probabilities":
        nodes.append(helper.make_node("Sigmoid", ["z"], ["y"]))
    made = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", classes])],
        [axes, offsets, numpy_helper.from_array(np.array([1]), "one")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-x))


class TestOurGraphs:
    @pytest.mark.parametrize("samples", [1, 1_600, 2_400, 16_000, 160_000, 400_000])
    def test_scores_are_those_of_the_network(self, network: CED, graph: Path, samples: int) -> None:
        waves = noise(2, samples)
        with torch.inference_mode():
            expected = network.probs(torch.from_numpy(waves)).numpy()
        np.testing.assert_allclose(OnnxModel(graph)(waves), expected, atol=1e-5)

    def test_real_clips(self, network: CED, graph: Path) -> None:
        if "CED_ESC10" not in os.environ:
            pytest.skip("CED_ESC10 is not set")
        model = OnnxModel(graph)
        for path in sorted(Path(os.environ["CED_ESC10"], "audio").glob("*.ogg"))[::40]:
            wave = load(path)[None]
            with torch.inference_mode():
                expected = network.probs(torch.from_numpy(wave)).numpy()
            np.testing.assert_allclose(model(wave), expected, atol=1e-5)

    def test_the_graph_contains_its_classes(self, graph: Path) -> None:
        assert OnnxModel(graph).labels == OWN

    @pytest.mark.parametrize("samples", [1_000, 20_000, 70_000])  # 160, 8 and 2 of them are scored together
    def test_batch_and_single_are_identical(self, graph: Path, samples: int) -> None:
        model, waves = OnnxModel(graph), noise(11, samples)
        for answer in (model, model.embed, model.columns):
            np.testing.assert_array_equal(answer(waves), np.concatenate([answer(wave[None]) for wave in waves]))

    def test_columns_start_at_their_frames(self, tmp_path: Path) -> None:
        network = CED(replace(SMALL, target_length=96, hop_size=320), OWN).eval()
        model = OnnxModel(export(weights_of(network), tmp_path / "a.onnx").path)
        expected = [0.0, 0.32, 0.64, 0.96, 1.28, 1.6, 1.92, 2.24, 2.56]  # 16 frames of 20 ms each, six in a piece
        for scorer in (model, TorchScorer(network)):
            count = scorer.columns(noise(1, 3 * 16_000)).shape[1]
            np.testing.assert_allclose(scorer.column_starts(count), expected)

    def test_embeddings_and_columns(self, graph: Path) -> None:
        model, waves = OnnxModel(graph), noise(2, 20_000)
        assert model.embed(waves).shape == (2, 64)
        assert model.columns(waves).shape == (2, 7, 3)

    def test_several_callers_at_once(self, graph: Path) -> None:
        model = OnnxModel(graph, threads=2)
        waves = [noise(1, samples) for samples in range(2_000, 34_000, 1_000)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(model, waves))
        for wave, scores in zip(waves, found, strict=True):
            np.testing.assert_array_equal(scores, model(wave))

    @pytest.mark.parametrize("changes", [{"pooling": "dm"}, {"pooling": "token"}, {"eval_avg": "max"}], ids=str)
    def test_batch_and_single_are_identical_in_pieces(self, changes: dict[str, Any], tmp_path: Path) -> None:
        network = CED(replace(SMALL, depth=1, target_length=96, **changes), OWN)
        model, waves = OnnxModel(export(weights_of(network), tmp_path / "a.onnx").path), noise(3, 50_000)
        for answer in (model, model.embed, model.columns):
            np.testing.assert_array_equal(answer(waves), np.concatenate([answer(wave[None]) for wave in waves]))


class TestForeignGraphs:
    def test_logits_become_probabilities_and_probabilities_are_unchanged(self, tmp_path: Path) -> None:
        waves = noise(2, 5_000)
        expected = sigmoid(waves.mean(1, keepdims=True) + np.arange(3.0) - 1)
        for kind in ("logits", "probabilities"):
            model = OnnxModel(foreign(tmp_path / f"{kind}.onnx", kind, ["b", "t"]))
            np.testing.assert_allclose(model(waves), expected, atol=1e-6)

    def test_short_waves_are_padded_to_one_patch(self, tmp_path: Path) -> None:
        model = OnnxModel(foreign(tmp_path / "a.onnx", "logits", ["b", "t"]))
        waves = noise(1, 600)
        np.testing.assert_allclose(model(waves), sigmoid(waves.mean() / 4 + np.arange(3.0) - 1)[None], atol=1e-6)

    def test_a_fixed_batch_gets_one_wave_at_a_time(self, tmp_path: Path) -> None:
        model = OnnxModel(foreign(tmp_path / "a.onnx", "logits", [1, "t"]))
        waves = noise(3, 5_000)
        np.testing.assert_allclose(model(waves), sigmoid(waves.mean(1, keepdims=True) + np.arange(3.0) - 1), atol=1e-6)

    def test_features_come_from_the_package(self, tmp_path: Path) -> None:
        model = OnnxModel(foreign(tmp_path / "a.onnx", "logits", ["b", 64, "n"]))
        waves = noise(2, 20_000)
        mean = LogMel()(torch.from_numpy(waves)).numpy().mean((1, 2))[:, None]
        np.testing.assert_allclose(model(waves), sigmoid(mean + np.arange(3.0) - 1), atol=1e-5)

    def test_our_graph_of_features(self, network: CED, tmp_path: Path) -> None:
        model = OnnxModel(export(weights_of(network), tmp_path / "a.onnx", "feats").path)
        waves = noise(2, 20_000)
        with torch.inference_mode():
            expected = network.probs(torch.from_numpy(waves)).numpy()
        np.testing.assert_allclose(model(waves), expected, atol=1e-5)
        assert model.labels == OWN

    def test_our_graph_of_features_of_own_classes(self, tmp_path: Path) -> None:
        own = ClassTable(("dog", "rain", "clock"))  # without mids, so the file beside it has none
        path = export(weights_of(CED(replace(SMALL, depth=1), own)), tmp_path / "a.onnx", "feats").path
        assert OnnxModel(path).labels == own

    def test_class_tables_beside_the_graph(self, tmp_path: Path) -> None:
        path = foreign(tmp_path / "a.onnx", "logits", ["b", "t"])
        assert OnnxModel(path).labels.names == ("class 0", "class 1", "class 2")
        (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}}))
        assert OnnxModel(path).labels.names == ("a", "b", "c")
        (tmp_path / "class_labels_indices.csv").write_text('index,mid,display_name\n0,x,"d, e"\n1,y,f\n2,z,g\n')
        assert OnnxModel(path).labels == ClassTable(("d, e", "f", "g"), ("x", "y", "z"))
        (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n0,x,d\n")
        with pytest.raises(CheckpointError, match="gives 3 scores, but its class table has 1 classes"):
            OnnxModel(path)

    def test_527_scores_are_audioset(self, tmp_path: Path) -> None:
        assert OnnxModel(foreign(tmp_path / "a.onnx", "logits", ["b", "t"], classes=527)).labels is audioset()

    def test_a_published_config_gives_full_names(self, tmp_path: Path) -> None:
        path = foreign(tmp_path / "model.onnx", "logits", ["b", "t"], classes=527)
        shutil.copy(HUB_CONFIGS / "tiny.json", tmp_path / "config.json")
        assert OnnxModel(path).labels is audioset()

    def test_no_embeddings(self, tmp_path: Path) -> None:
        model = OnnxModel(foreign(tmp_path / "a.onnx", "logits", ["b", "t"]))
        for answer in (model.embed, model.columns):
            with pytest.raises(CheckpointError, match=r"a\.onnx has no output '(embedding|columns)', only y"):
                answer(noise(1, 5_000))

    @pytest.mark.parametrize("shape", [["b"], [1, 1, 1, 1], [4, "t"]], ids=str)
    def test_other_inputs(self, shape: list[int | str], tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"a\.onnx takes "):
            OnnxModel(identity(tmp_path / "a.onnx", shape))

    def test_other_outputs(self, tmp_path: Path) -> None:
        message = r"gives y \['b', 64, 't'\]; a tagger gives scores \(batch, classes\)"
        with pytest.raises(CheckpointError, match=message):
            OnnxModel(identity(tmp_path / "a.onnx", ["b", 64, "t"]))


def identity(path: Path, shape: list[int | str]) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    made = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", ends[:1], ends[1:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def limited(path: Path, longest: int) -> Path:
    """Write a graph that fails on more than `longest` samples, as the hub's does: it adds a table of that many."""
    table = numpy_helper.from_array(np.zeros((1, longest), np.float32), "table")
    numbers = [numpy_helper.from_array(np.array(value), name) for name, value in (("zero", [0]), ("axis", [1]))]
    offsets = numpy_helper.from_array(np.arange(3, dtype=np.float32)[None] / 4, "offsets")
    nodes = [
        helper.make_node("Shape", ["x"], ["size"], start=1),
        helper.make_node("Slice", ["table", "zero", "size", "axis"], ["places"]),
        helper.make_node("Add", ["x", "places"], ["placed"]),
        helper.make_node("ReduceMean", ["placed", "axis"], ["mean"]),
        helper.make_node("Sigmoid", ["mean"], ["prob"]),
        helper.make_node("Mul", ["prob", "offsets"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "limited",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 3])],
        [table, *numbers, offsets],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


class TestWindows:
    def test_a_window_beyond_the_limit_of_the_graph_is_refused(self, tmp_path: Path) -> None:
        model = OnnxModel(limited(tmp_path / "model.onnx", 163_840))
        model.check_window(10.0)
        for seconds in (12.0, 1e6, 12.0):
            with pytest.raises(ConfigError, match=r"graph .*model\.onnx takes at most 10\.2[34] s"):
                model.check_window(seconds)
        model.check_window(10.23)

    def test_our_graphs_take_any_window(self, graph: Path) -> None:
        OnnxModel(graph).check_window(36_000.0)

    def test_without_padding_our_graphs_take_one_piece(self, tmp_path: Path) -> None:
        network = CED(replace(SMALL, target_length=96, pad_last=False), OWN)
        model = OnnxModel(export(weights_of(network), tmp_path / "a.onnx").path)
        longest = (96 * 160 - 1) / 16_000
        model.check_window(longest)
        assert model(noise(1, 96 * 160 - 1)).shape == (1, 3)
        with pytest.raises(ConfigError, match=r"at most 0\.95 s"):
            model.check_window(1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample_rate", "32000"),
        ("output", "logits"),
        ("piece", "x"),
        ("piece", "0"),
        ("piece", "9" * 30),
        ("classes", "[" * 10_000),
        ("classes", "{}"),
    ],
)
def test_invalid_metadata(graph: Path, tmp_path: Path, key: str, value: str) -> None:
    made = onnx.load(graph)
    for each in made.metadata_props:
        if each.key == key:
            each.value = value
    onnx.save(made, tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match=r"a\.onnx"):
        OnnxModel(tmp_path / "a.onnx")


@pytest.mark.parametrize("content", [b"", b"\x08", b"RIFF0000WAVEfmt ", bytes(range(256)) * 10])
def test_files_that_are_not_graphs(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^graph .*a\.onnx is damaged or not ONNX") as caught:
        OnnxModel(tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)


def test_a_graph_cut_short(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(graph.read_bytes()[:50_000])
    with pytest.raises(CheckpointError, match="is damaged or not ONNX"):
        OnnxModel(tmp_path / "a.onnx")


class TestOpen:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("CED_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        return tmp_path / "cache"

    def test_a_name_gives_the_scores_of_the_network(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        network = random_network("ced_tiny")
        with running(LocalHub()) as hub:
            monkeypatch.setattr(zoo, "MODELS", published(hub, {"ced_tiny": network}))
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            monkeypatch.delenv("CED_OFFLINE")
            model = open_model("ced_tiny")
        assert model.labels == audioset()
        waves = noise(1, 20_000)
        with torch.inference_mode():
            expected = network.probs(torch.from_numpy(waves)).numpy()
        np.testing.assert_allclose(model(waves), expected, atol=1e-5)
        for path in cache.parent.glob("hub/**/model.safetensors"):
            path.unlink()
        assert open_model("ced_tiny").path == model.path  # from the cached graph alone

    def test_cached_weights_of_zenodo_replace_those_of_the_hub(
        self, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(DownloadError, match="ced_tiny is not cached"):
            open_model("ced_tiny")
        cache.mkdir()
        torch.save(CED(replace(SMALL, outputdim=527)).state_dict(), cache / "audiotransformer_tiny_mAP_4814.pt")
        with caplog.at_level(logging.INFO, "ced"):
            model = open_model("ced_tiny")
        assert model.path.parent == cache / "graphs"
        fallback, made = caplog.messages
        assert "audiotransformer_tiny_mAP_4814.pt, for which no checksum is published" in fallback
        assert made == f"making the float32 graph of ced_tiny, once: {model.path}"

    def test_the_graph_of_a_checkpoint_is_made_once(
        self, cache: Path, network: CED, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        loading.save(tmp_path / "run" / "averaged.safetensors", network)
        model = open_model(tmp_path / "run")
        assert model.labels == OWN
        with caplog.at_level(logging.INFO, "ced"):
            assert open_model(str(tmp_path / "run" / "averaged.safetensors")).path == model.path
        assert caplog.messages == []
        loading.save(tmp_path / "run" / "averaged.safetensors", CED(SMALL, OWN))
        assert open_model(tmp_path / "run").path != model.path
        assert len(list((cache / "graphs").glob("*.onnx"))) == 2

    def test_changed_graph_code_makes_new_graphs(
        self, cache: Path, network: CED, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loading.save(tmp_path / "a.safetensors", network)
        before = open_model(tmp_path / "a.safetensors").path
        monkeypatch.setattr("ced.model.graph.code_digest", lambda: "0" * 16)
        after = open_model(tmp_path / "a.safetensors").path
        assert after != before
        assert before.exists()  # perhaps another install uses it
        for path in (cache / "graphs").iterdir():
            os.utime(path, (0, 0))
        monkeypatch.setattr("ced.model.graph.code_digest", lambda: "1" * 16)
        newest = open_model(tmp_path / "a.safetensors").path
        assert list((cache / "graphs").glob("*.onnx")) == [newest]

    def test_the_digest_covers_the_code_of_the_graph(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from ced.model import graph as package

        names = {path.name for path in package._SOURCES}
        assert {"network.py", "builder.py", "export.py", "runtime.py", "features.py", "config.py", "labels.py"} <= names
        before = package.code_digest()
        changed = tmp_path / "network.py"
        changed.write_bytes(Path(package.__file__).with_name("network.py").read_bytes() + b"\n# changed\n")
        sources = [changed if path.name == "network.py" else path for path in package._SOURCES]
        monkeypatch.setattr(package, "_SOURCES", sources)
        package.code_digest.cache_clear()
        try:
            assert package.code_digest() != before
        finally:
            package.code_digest.cache_clear()

    def test_a_graph_gets_its_name_when_it_is_complete(
        self, cache: Path, network: CED, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loading.save(tmp_path / "a.safetensors", network)

        def fail(_: object, out: Path) -> None:
            out.write_bytes(b"half a graph")
            raise CheckpointError("stopped")

        monkeypatch.setattr("ced.model.graph.export.quantize", fail)
        with pytest.raises(CheckpointError, match="stopped"):
            open_model(tmp_path / "a.safetensors", precision="int8")
        assert [path.suffix for path in (cache / "graphs").iterdir()] == [".lock"]

    def test_a_damaged_graph_in_the_cache_is_made_again(self, network: CED, tmp_path: Path) -> None:
        loading.save(tmp_path / "a.safetensors", network)
        path = open_model(tmp_path / "a.safetensors").path
        path.write_bytes(b"damaged")
        assert open_model(tmp_path / "a.safetensors").labels == OWN

    def test_int8_is_made_of_the_same_weights(self, network: CED, graph: Path, tmp_path: Path) -> None:
        loading.save(tmp_path / "a.safetensors", network)
        exact, waves = open_model(tmp_path / "a.safetensors"), noise(1, 20_000)
        for source in (tmp_path / "a.safetensors", graph):
            found = open_model(source, precision="int8")
            assert found.precision == "int8"
            assert 0 < np.abs(found(waves) - exact(waves)).max() < 0.02
            assert open_model(found.path, precision="int8").path == found.path
        assert open_model("esc10", precision="int8").precision == "int8"

    def test_int8_of_a_graph_from_elsewhere_is_refused(self, tmp_path: Path) -> None:
        path = foreign(tmp_path / "a.onnx", "logits", ["b", "t"])
        with pytest.raises(CheckpointError, match=r"a\.onnx is not one of ced"):
            open_model(path, precision="int8")
        with pytest.raises(ConfigError, match="'int4'; allowed: float32, int8"):
            open_model(path, precision="int4")  # type: ignore[arg-type]

    @pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a folder that cannot be made")
    def test_a_cache_that_cannot_be_written_is_one_line(
        self, network: CED, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loading.save(tmp_path / "a.safetensors", network)
        monkeypatch.setenv("CED_CACHE", "/proc/ced")
        with pytest.raises(CheckpointError, match=r"cannot write /proc/ced.*CED_CACHE"):
            open_model(tmp_path / "a.safetensors")

    def test_an_onnx_file(self, graph: Path) -> None:
        assert open_model(graph, threads=2).labels == OWN

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("ced_tinny", "no model and no file is named 'ced_tinny'; did you mean ced_tiny"),
            ("nowhere.onnx", r"no graph at nowhere\.onnx"),
            ("nowhere.pt", r"no checkpoint at nowhere\.pt"),
            ("nowhere/ced_tiny", "no checkpoint at nowhere/ced_tiny"),
        ],
    )
    def test_neither_a_name_nor_a_path(self, given: str, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            open_model(given)

    def test_a_checkpoint_without_torch(self, network: CED, tmp_path: Path) -> None:
        loading.save(tmp_path / "a.safetensors", network)
        program = (
            "import sys; sys.modules['torch'] = None\n"
            "from ced.model.runtime import open_model\n"
            "print(*open_model(sys.argv[1]).labels.names)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "a.safetensors"], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == list(OWN.names)
