"""Teachers with features of their own: ONNX graphs, models of Transformers and callables, in one store."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import ced
from ced.config import StoreConfig, TeacherEntry, TrainConfig, check
from ced.distill.hf_teacher import HfTeacher
from ced.distill.onnx_teacher import OnnxTeacher
from ced.distill.store import store
from ced.distill.teachers import Ensemble, Teacher, load_teacher, teacher_name
from ced.distill.train import train
from ced.distill.view_store import Rows, ViewStore
from ced.distill.views import NO_VIEW, SoundView, ViewRecipe, mask_spectrogram, mask_waves
from ced.errors import CedError, CheckpointError, ConfigError, DownloadError, StoreError
from ced.sound.labels import ClassTable, audioset
from tests.distill.conftest import RATE, wave_of, write_pack
from tests.local_hub import LocalHub, running

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NAMES = audioset().names
PLAIN = SoundView(None, None)
VIEW = SoundView((0.25, 0.5), (1_000.0, 2_000.0))
EXAMPLE = yaml.safe_load((ROOT / "examples" / "mn04_as.yaml").read_text(encoding="utf-8"))

# Teachers as a user writes them.
CALLABLES = """
import torch
from ced.distill.views import mask_waves
from ced.sound.labels import ClassTable

calls = []

class Energy:
    takes = "waves"
    labels = ClassTable(("loud", "quiet"))

    def __call__(self, waves, rate, views):
        calls.append((waves.clone(), rate, list(views)))
        loud = mask_waves(waves, views, rate).square().mean(1).sqrt().clamp(0, 1)
        return torch.stack([loud, 1 - loud], dim=1)

energy = Energy()

def half(mel):
    return torch.full((len(mel), 3), 0.5)

half.labels = ClassTable(("quiet", "bell", "dog"))

def confused(mel):
    return half(mel)

confused.takes = "pictures"

def changes_input(mel):
    mel.zero_()
    return torch.stack([mel.mean((1, 2)), mel.mean((1, 2)) + 1], dim=1)

changes_input.labels = ["quiet", "loud"]

def changes_waves(waves, rate, views):
    views.clear()
    return torch.stack([waves.zero_().mean(1), waves.mean(1) + 1], dim=1)

changes_waves.takes = "waves"

def one_label(mel):
    return half(mel)

one_label.labels = "dog"

def two_labels(mel):
    return half(mel)

two_labels.labels = ["dog", "dog", "cat"]

class Stateful(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, mel):
        return half(mel)

first_state, second_state = Stateful({"threshold": 0.5, "kept": [torch.ones(2), None]}), Stateful({"threshold": 0.6})
lazy = torch.nn.LazyLinear(3)
"""


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder with a pack of ten clips of a second, and callables; on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "homemade", raising=False)
    Path("homemade.py").write_text(CALLABLES)
    rng = np.random.default_rng(0)
    write_pack(Path("mine.tsv"), {f"{clip}.wav": wave_of(clip % 4, rng) for clip in range(10)}, ["0"] * 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(**changes: Any) -> Path:
    values = {"train_data": "mine.tsv", "outputpath": "out", "topk": 2, "chunk_length": 1, "epochs": 1}
    return store(check(StoreConfig, values | {"batch_size": 4, "num_workers": 0} | changes, "test"))


def rows_of(folder: Path) -> Rows:
    return ViewStore(folder).rows(1)


def save_graph(path: Path, inputs: list[Any], classes: int, axes: list[int], kind: int = TensorProto.FLOAT) -> None:
    """Write a graph: the mean of the absolute input over `axes`, by a random matrix."""
    rng = np.random.default_rng(1)
    size = next((size for size in inputs[1:] if isinstance(size, int) and size > 1), 1)
    weights = rng.normal(0, 0.2, (size, classes)).astype(np.float32)
    nodes = [
        helper.make_node("Abs", ["spec"], ["positive"]),
        helper.make_node("ReduceMean", ["positive", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    constants: dict[str, Any] = {
        "axes": np.array(axes, np.int64),
        "shape": np.array([-1, size], np.int64),
        "weights": weights,
    }
    batch = inputs[0] if len(inputs) > 1 else 1
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("spec", kind, inputs)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def save_onnx(path: Path, **changes: Any) -> None:
    """Write a graph of the form of EfficientAT's mn04_as, and its settings from the example, changed."""
    save_graph(path, ["batch", 1, 128, "time_frames"], 527, [3])
    path.with_suffix(".yaml").write_text(yaml.safe_dump({**EXAMPLE, **changes}))


def save_ast(folder: str, **changes: Any) -> None:
    """Write a small AST with AudioSet's classes and random weights, and its feature extractor."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 64, "max_length": 128, "num_mel_bins": 64, "initializer_range": 0.5}
    names: dict[str, Any] = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    ASTForAudioClassification(ASTConfig(**(size | names | changes))).save_pretrained(folder)
    ASTFeatureExtractor(max_length=128, num_mel_bins=64).save_pretrained(folder)


def save_wav2vec2(folder: str) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16}
    layers = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4)}
    names = {"id2label": {0: "dog", 1: "bell", 2: "rain"}, "problem_type": "single_label_classification"}
    Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**size, **layers, **names)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def noise(clips: int = 3, seconds: float = 1.0) -> Tensor:
    return torch.randn(clips, round(seconds * RATE), generator=torch.Generator().manual_seed(0)) * 0.1


# ONNX graphs


def test_an_onnx_graph_teaches() -> None:
    save_onnx(Path("small.onnx"))
    folder = run(model="onnx:small.onnx", epochs=2)
    assert folder == Path("out/onnx_small/mine/chunk_1")
    meta, rows = ViewStore(folder).meta, rows_of(folder)
    assert (meta.teachers, meta.labels, len(rows)) == (("onnx:small",), audioset(), 10)
    assert meta.members == ({"takes": "waves", "masks": "waves"},)
    assert rows.values.min() > 0
    assert len(set(rows.values[:, 0].tolist())) > 1
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "logits_ep2_0.h5").unlink()
    assert run(model="onnx:small.onnx", epochs=2) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_onnx(Path("small.onnx"), std=4)
    with pytest.raises(CedError):  # std belongs to the features
        run(model="onnx:small.onnx")
    save_onnx(Path("small.onnx"), features={**EXAMPLE["features"], "std": 4})
    with pytest.raises(StoreError, match="settings or the class table of teacher onnx:small differ"):
        run(model="onnx:small.onnx")


def test_the_features_of_an_onnx_graph_are_masked_in_its_own_bands() -> None:
    save_onnx(Path("small.onnx"), masks="features")
    teacher = OnnxTeacher(Path("small.onnx"))
    waves = noise()
    plain, viewed = teacher(waves, RATE, [PLAIN] * 3), teacher(waves, RATE, [VIEW, PLAIN, VIEW])
    assert viewed.shape == (3, 527)
    assert torch.equal(plain[1], viewed[1])
    assert not torch.allclose(plain[0], viewed[0], atol=1e-3)
    assert teacher.masks == "features"
    # What the graph computes, by hand: the masked features' mean over time, through its matrix.
    spectrogram = teacher._spectrogram
    assert spectrogram is not None
    from ced.distill.spectrogram import resample

    features = spectrogram(resample(waves, RATE, 32_000))
    times = torch.arange(features.shape[2]) * 320 / 32_000
    hidden = mask_spectrogram(features, [VIEW, PLAIN, VIEW], times, spectrogram.hertz, (np.log(1e-5) + 4.5) / 5)
    matrix = numpy_helper.to_array(onnx.load("small.onnx").graph.initializer[2])
    expected = (hidden.abs().mean(2) @ torch.tensor(matrix)).sigmoid()
    assert torch.allclose(viewed, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "axes", "shape"),
    [
        (["batch", "t"], [1], ["batch", "time"]),
        ([1, "t"], [1], ["batch", "time"]),
        (["batch", 1, "t"], [2], ["batch", 1, "time"]),
        (["t"], [0], ["time"]),
    ],
)
def test_graphs_that_take_waves_get_masked_waves(inputs: list[Any], axes: list[int], shape: list[Any]) -> None:
    save_graph(Path("waves.onnx"), inputs, 2, axes)
    settings = {"rate": 8_000, "shape": shape, "activation": "softmax"}
    Path("waves.yaml").write_text(yaml.safe_dump(settings))
    teacher = OnnxTeacher(Path("waves.yaml"))
    waves, views = noise(), [VIEW, PLAIN, VIEW]
    probs = teacher(waves, RATE, views)
    assert teacher.masks == "waves"
    assert torch.allclose(probs.sum(1), torch.ones(3))
    alone = torch.cat([teacher(waves[i : i + 1], RATE, views[i : i + 1]) for i in range(3)])
    assert torch.allclose(probs, alone, atol=1e-6)
    before = teacher(mask_waves(waves, views, RATE), RATE, [PLAIN] * 3)
    assert torch.allclose(probs, before, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rates": 32_000}, r"small\.yaml.*\n.*rates: unknown key; did you mean rate"),
        ({"shape": ["batch", "time", "mel"]}, r"shape is .*input spec of the graph is \['batch', 1, 128"),
        (
            {"shape": ["batch", 1, "time", "mel"]},
            r"axis time has 128, but features\.frames is not set; set features\.frames: 128",
        ),
        ({"shape": ["batch", 1, "time"]}, r"must have time and mel once"),
        ({"shape": [1, "batch", "mel", "time"]}, r"batch first or not at all"),
        ({"features": None}, r"without features, the graph takes waves"),
        (
            {"features": {**EXAMPLE["features"], "mel": {"bands": 64, "high": 15_000}}},
            r"axis mel has 128, but features\.mel\.bands is 64; set",
        ),
        ({"output": "probs"}, r"no output probs; it has logits"),
        ({"classes": "few.csv"}, r"classes names 2 classes; output logits has 527"),
        ({"activation": "tanh"}, r"activation: input should be 'sigmoid', 'softmax' or 'none'"),
        ({"rate": 16_000}, r"mel\.high 15000 Hz is above half of rate 16000"),
    ],
)
def test_settings_that_do_not_fit_the_graph_are_explained(changes: dict[str, Any], expected: str) -> None:
    Path("few.csv").write_text("index,display_name\n0,dog\n1,cat\n")
    save_onnx(Path("small.onnx"), **changes)
    with pytest.raises((ConfigError, CheckpointError), match=expected):
        run(model="onnx:small.onnx")


def test_graphs_without_settings_and_damaged_ones_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"no absent\.yaml"):
        run(model="onnx:absent.onnx")
    save_onnx(Path("small.onnx"), graph="other.onnx")
    with pytest.raises(CheckpointError, match=r"no graph at other\.onnx"):
        run(model="onnx:small.yaml")
    Path("small.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not ONNX"):
        run(model="onnx:small.onnx")
    save_graph(Path("small.onnx"), ["batch", 1, 128, "n"], 527, [3], TensorProto.DOUBLE)
    with pytest.raises(CedError):
        run(model="onnx:small.onnx")


def test_a_changed_class_table_is_noticed() -> None:
    save_graph(Path("waves.onnx"), ["batch", "t"], 2, [1])
    settings = {"rate": 8_000, "shape": ["batch", "time"], "activation": "softmax", "classes": "own.csv"}
    Path("waves.yaml").write_text(yaml.safe_dump(settings))
    Path("own.csv").write_text("index,name\n0,dog\n1,bell\n")
    run(model="onnx:waves.onnx", classes=_table("bell", "dog", "owl"))
    Path("own.csv").write_text("index,name\n0,bell\n1,dog\n")
    with pytest.raises(StoreError, match="class table of teacher onnx:waves differ"):
        run(model="onnx:waves.onnx", classes=_table("bell", "dog", "owl"), epochs=2)


def test_a_run_that_failed_at_once_can_be_repaired() -> None:
    save_onnx(Path("small.onnx"), activation="none")
    with pytest.raises(StoreError, match=r"teacher onnx:small gave .*: they lie between -\d.* and \d.*activation"):
        run(model="onnx:small.onnx")
    save_onnx(Path("small.onnx"))
    assert len(rows_of(run(model="onnx:small.onnx", batch_size=5))) == 10


def test_patches_of_a_graph_average_their_probabilities() -> None:
    matrix = np.random.default_rng(0).normal(0, 3, (1_000, 2)).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", ["wave", "shape"], ["patches"]),
        helper.make_node("MatMul", ["patches", "matrix"], ["logits"]),
    ]
    constants: dict[str, Any] = {"shape": np.array([-1, 1_000], np.int64), "matrix": matrix}
    graph = helper.make_graph(
        nodes,
        "patches",
        [helper.make_tensor_value_info("wave", TensorProto.FLOAT, ["t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), "patches.onnx")
    Path("patches.yml").write_text(yaml.safe_dump({"rate": RATE, "shape": ["time"], "activation": "sigmoid"}))
    waves = noise()
    probs = (waves.reshape(3, 16, 1_000) @ torch.tensor(matrix)).sigmoid().mean(1)
    teacher = OnnxTeacher(Path("patches.onnx"))  # with a YAML file named .yml
    assert torch.allclose(teacher(waves, RATE, [PLAIN] * 3), probs, atol=1e-3)


def test_graphs_with_fixed_sizes_name_the_setting() -> None:
    save_graph(Path("waves.onnx"), ["batch", 7_800], 2, [1])
    Path("waves.yaml").write_text(yaml.safe_dump({"rate": RATE, "shape": ["batch", "time"], "activation": "sigmoid"}))
    with pytest.raises(ConfigError, match=r"teacher onnx:waves: .*16000 samples.* set chunk_length to 0\.4875"):
        run(model="onnx:waves.onnx")
    save_onnx(Path("small.onnx"))
    save_graph(Path("small.onnx"), ["batch", 1, 128, 998], 527, [3])
    with pytest.raises(ConfigError, match=r"axis time has 998.* set features\.frames: 998"):
        run(model="onnx:small.onnx")
    save_graph(Path("small.onnx"), [4, 1, 128, "n"], 527, [3])
    with pytest.raises(ConfigError, match="exactly 4 clips at once"):
        run(model="onnx:small.onnx")


def test_chunks_that_do_not_fit_the_features_name_the_teacher() -> None:
    save_onnx(Path("small.onnx"), features={**EXAMPLE["features"], "frames": 50})
    with pytest.raises(ConfigError, match=r"onnx:small: .* 100 frames; at most 50"):
        run(model="onnx:small.onnx")


# Models of Transformers


def test_a_student_learns_from_an_ast_and_tags(caplog: pytest.LogCaptureFixture) -> None:
    save_ast("ast")
    with caplog.at_level(logging.INFO, logger="ced"):
        folder = run(model="hf:ast", epochs=2, topk=20)
    assert folder == Path("out/hf_ast/mine/chunk_1")
    assert "masked in its features (ASTFeatureExtractor); probabilities by sigmoid" in caplog.text
    meta = ViewStore(folder).meta
    assert (meta.teachers, meta.labels) == (("hf:ast",), audioset())
    assert meta.members == ({"takes": "waves", "masks": "features"},)
    values = {"train_data": "mine.tsv", "logitspath": folder, "model": "ced_tiny", "pretrained": False, "epochs": 2}
    values |= {"model_args": {"embed_dim": 32, "num_heads": 2, "depth": 1, "target_length": 112}, "num_workers": 0}
    config = check(TrainConfig, values | {"batch_size": 5, "optimizer": "Adam", "mode": "off"}, "test")
    student = train(config, name="student")
    (window, *_) = ced.Tagger(student).tag(ROOT / "tests" / "data" / "clips" / "rooster.flac")
    assert window.tags
    assert all(tag.label in NAMES for tag in window.tags)


def test_an_ast_sees_the_features_of_its_extractor_with_the_bands_filled() -> None:
    save_ast("ast")
    teacher, waves = HfTeacher("ast", CPU), noise()
    extracted = teacher.extractor(list(waves.numpy()), sampling_rate=RATE, return_tensors="pt")
    with torch.inference_mode():
        expected = teacher.model(**extracted).logits.sigmoid()
        assert torch.allclose(teacher(waves, RATE, [PLAIN] * 3), expected, atol=1e-4)
        features = extracted["input_values"]  # (b, n, f)
        features[:, 24:49] = -teacher.extractor.mean / (2 * teacher.extractor.std)  # 0.01 i + 0.0125 in 0.25 to 0.5 s
        expected = teacher.model(features).logits.sigmoid()
        assert torch.allclose(teacher(waves, RATE, [SoundView((0.25, 0.5), None)] * 3), expected, atol=1e-4)


def test_models_of_waves_are_masked_in_the_waves(caplog: pytest.LogCaptureFixture) -> None:
    save_wav2vec2("w2v")
    with caplog.at_level(logging.INFO, logger="ced"):
        teacher = HfTeacher("w2v", CPU)
    assert "masked in its waves (Wav2Vec2FeatureExtractor); probabilities by softmax" in caplog.text
    waves, views = noise(), [VIEW, PLAIN, VIEW]
    with torch.inference_mode():
        probs = teacher(waves, RATE, views)
        assert torch.allclose(probs, teacher(mask_waves(waves, views, RATE), RATE, [PLAIN] * 3), atol=1e-3)
    assert torch.allclose(probs.sum(1), torch.ones(3))
    assert teacher.labels == ClassTable(("dog", "bell", "rain"))


def test_whisper_is_masked_in_its_features() -> None:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

    size = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = WhisperConfig(**size, num_mel_bins=80, id2label={0: "dog", 1: "bell"}, classifier_proj_size=8)
    WhisperForAudioClassification(config).save_pretrained("whisper")
    WhisperFeatureExtractor().save_pretrained("whisper")
    teacher, seen = HfTeacher("whisper", CPU), []
    teacher.model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_features"]), with_kwargs=True)
    with torch.inference_mode():
        teacher(noise(1), RATE, [VIEW])
    (features,) = seen
    assert features.shape == (1, 80, 3_000)
    hidden = features[0] == 0
    assert hidden.all(0).nonzero().flatten().tolist() == list(range(25, 51))
    assert 0 < int(hidden[:, :101].all(1).sum()) < 40
    assert not hidden[:, 101:].any()  # silence behind the sound is kept


@pytest.mark.parametrize("broken", ["no config", "no weights", "no head", "unknown kind", "ced"])
def test_models_that_cannot_teach_are_explained(broken: str) -> None:
    save_ast("ast")
    expected = {
        "no config": "no preprocessor_config.json",
        "no weights": "cannot load",
        "no head": "weights are missing",
    }
    kind: type[CedError] = CheckpointError
    if broken == "no config":
        Path("ast/preprocessor_config.json").unlink()
    elif broken == "no weights":
        Path("ast/model.safetensors").unlink()
    elif broken == "no head":
        from transformers import ASTModel

        ASTModel.from_pretrained("ast").save_pretrained("ast")
    else:
        config = json.loads(Path("ast/config.json").read_text())
        name = "ced" if broken == "ced" else "homemade"
        Path("ast/config.json").write_text(json.dumps(config | {"model_type": name}))
        expected |= {"unknown kind": "cannot load", "ced": "without hf:"}
        kind = ConfigError if broken == "ced" else kind
    with pytest.raises(kind, match=expected[broken]) as caught:
        run(model="hf:ast")
    assert "\n" not in str(caught.value)


def test_a_changed_configuration_of_a_model_is_noticed() -> None:
    save_ast("ast")
    before = load_teacher(TeacherEntry(name="hf:ast"), {}, CPU).weights
    config = json.loads(Path("ast/config.json").read_text())
    Path("ast/config.json").write_text(json.dumps(config | {"transformers_version": "1.0"}))
    assert load_teacher(TeacherEntry(name="hf:ast"), {}, CPU).weights == before
    turned = dict(zip(config["id2label"], reversed(config["id2label"].values()), strict=True))
    for changes in ({"num_attention_heads": 4}, {"id2label": turned}):
        Path("ast/config.json").write_text(json.dumps(config | changes))
        assert load_teacher(TeacherEntry(name="hf:ast"), {}, CPU).weights != before


def test_class_names_that_cannot_be_used_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    save_wav2vec2("w2v")
    config = json.loads(Path("w2v/config.json").read_text())
    Path("w2v/config.json").write_text(json.dumps(config | {"id2label": {"0": "dog", "1": "dog", "2": "rain"}}))
    assert HfTeacher("w2v", CPU).labels is None
    assert "hf:w2v: the class names (id2label)" in caplog.text


def test_an_entry_may_name_the_activation() -> None:
    save_wav2vec2("w2v")
    entry = TeacherEntry(name="hf:w2v", activation="sigmoid")
    logits, views = load_teacher(entry, {}, CPU), [PLAIN] * 3
    probs = load_teacher(TeacherEntry(name="hf:w2v"), {}, CPU).score(noise(), RATE, views)
    with torch.inference_mode():
        assert torch.allclose(logits.score(noise(), RATE, views).logit().softmax(1), probs, atol=1e-5)
    config = json.loads(Path("w2v/config.json").read_text())
    Path("w2v/config.json").write_text(json.dumps(config | {"problem_type": "regression"}))
    with pytest.raises(ConfigError, match="trained for regression"):
        load_teacher(entry, {}, CPU)


def test_code_of_a_repository_is_never_run() -> None:
    save_ast("ast")
    config = json.loads(Path("ast/config.json").read_text())
    code = {"auto_map": {"AutoConfig": "own.Own", "AutoModelForAudioClassification": "own.Own"}, "model_type": "own"}
    Path("ast/config.json").write_text(json.dumps(config | code))
    Path("ast/own.py").write_text("open('ran', 'w')\n")
    with pytest.raises(CheckpointError, match="code of its repository, which is never run"):
        run(model="hf:ast")
    assert not Path("ran").exists()


def test_a_model_of_the_hub_is_downloaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_ast("ast")
    files = {("owner/small-ast", path.name): path.read_bytes() for path in Path("ast").iterdir()}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("CED_OFFLINE", raising=False)
    with running(LocalHub(files)) as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        reports: list[tuple[str, int, int]] = []
        entry = TeacherEntry(name="hf:owner/small-ast")
        found = load_teacher(entry, {}, CPU, lambda *report: reports.append(report))
        assert reports[-1][0] == "download owner/small-ast"
        with pytest.raises(DownloadError, match="owner/small-ast"):
            HfTeacher("owner/small-ast@nowhere", CPU)
    monkeypatch.setenv("CED_OFFLINE", "1")
    with pytest.raises(DownloadError, match=r"CED_OFFLINE is set.*hf:FOLDER"):
        HfTeacher("owner/another", CPU)
    again = load_teacher(entry, {}, CPU)
    assert (found.name, found.weights) == ("hf:owner/small-ast", again.weights)
    assert found.weights == load_teacher(TeacherEntry(name="hf:ast"), {}, CPU).weights


def test_a_name_that_is_no_repository_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a repository"):
        run(model="hf:nowhere")
    with pytest.raises(ConfigError, match="neither a folder nor a repository"):
        run(model="hf:../nowhere")


# Callables


def test_a_callable_that_takes_waves_gets_them_with_views() -> None:
    folder = run(model="homemade:energy")
    assert ViewStore(folder).meta.labels == ClassTable(("loud", "quiet"))
    waves, rate, views = sys.modules["homemade"].calls[1]  # after the probe
    assert (waves.shape, rate) == ((4, RATE), RATE)
    assert all(isinstance(view, SoundView) for view in views)
    assert any(view.time for view in views)
    rows = rows_of(folder)
    loud = mask_waves(waves, views, rate).square().mean(1).sqrt()
    np.testing.assert_allclose(rows.values[:4, rows.indexes[0].argmin()], 0, atol=1)  # probabilities
    for value, indexes, expected in zip(rows.values[:4], rows.indexes[:4], loud, strict=True):
        assert abs(float(value[indexes.tolist().index(0)]) - float(expected)) < 1e-3


def test_other_values_of_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes = 'pictures'; allowed: 'mel' and 'waves'"):
        run(model="homemade:confused")


def test_a_callable_that_changes_its_input_does_not_change_that_of_others() -> None:
    changing = [load_teacher(TeacherEntry(name=f"homemade:changes_{what}"), {}, CPU) for what in ("input", "waves")]
    energy = load_teacher(TeacherEntry(name="homemade:energy"), {}, CPU)
    level = Teacher("level", lambda mel, rate, views: mel.mean((1, 2))[:, None].repeat(1, 2).sigmoid())
    others, uniforms = [replace(energy, labels=None), level], torch.tensor([[0.2, 0.5]])
    alone = Ensemble(others, "off", ViewRecipe(), RATE, CPU)(noise(1), uniforms)
    members = [*(replace(teacher, labels=None) for teacher in changing), *others]
    mean = Ensemble(members, "off", ViewRecipe(), RATE, CPU)(noise(1), uniforms)
    assert torch.allclose(mean, (torch.tensor([[0.0, 1.0]]) + alone) / 2, atol=1e-6)


def test_labels_of_a_callable_may_be_names_and_nothing_else() -> None:
    teacher = load_teacher(TeacherEntry(name="homemade:changes_input"), {}, CPU)
    assert teacher.labels == ClassTable(("quiet", "loud"))
    with pytest.raises(ConfigError, match="labels of teacher homemade:one_label are str; allowed: a ClassTable"):
        run(model="homemade:one_label")
    with pytest.raises(ConfigError, match=r"labels of teacher homemade:two_labels: .*'dog' occurs more than once"):
        run(model="homemade:two_labels")


def test_modules_with_other_state_than_tensors_can_teach() -> None:
    first, again, second = (
        load_teacher(TeacherEntry(name=f"homemade:{name}_state"), {}, CPU).weights
        for name in ("first", "first", "second")
    )
    assert first == again != second
    with pytest.raises(ConfigError, match="cannot read the weights of teacher homemade:lazy"):
        run(model="homemade:lazy")


# Several teachers


def test_kinds_weights_and_class_tables_may_be_mixed(caplog: pytest.LogCaptureFixture) -> None:
    folder = run(model=[{"name": "homemade:energy", "weight": 3}, {"name": "homemade:half", "batch_size": 3}])
    assert folder == Path("out/homemade_energy_homemade_half/mine/chunk_1")
    meta, rows = ViewStore(folder).meta, rows_of(folder)
    assert meta.labels == ClassTable(("loud", "quiet"))  # of the first teacher
    assert meta.members == ({"takes": "waves", "weight": 3.0}, {"batch_size": 3})
    assert json.loads((folder / "meta.json").read_text())["version"] == 3
    (alone,) = [rows_of(run(model="homemade:energy", outputpath="alone"))]
    for row in range(10):
        loud, quiet = (float(rows.values[row][rows.indexes[row].tolist().index(index)]) for index in (0, 1))
        before = dict(zip(alone.indexes[row].tolist(), alone.values[row].astype(float), strict=True))
        assert loud == pytest.approx(before[0], abs=2e-3)  # only the first teacher knows it
        assert quiet == pytest.approx((3 * before[1] + 0.5) / 4, abs=2e-3)
    (warning,) = [record.getMessage() for record in caplog.records if "matched" in record.getMessage()]
    assert "2 of 3 of teacher homemade:half are left out: bell, dog" in warning
    with pytest.raises(StoreError, match=r"weight of teacher homemade:energy was 3\.0 and is now the default"):
        run(model=["homemade:energy", {"name": "homemade:half", "batch_size": 3}])


def fixed(values: list[float], labels: ClassTable | None = None, weight: float = 1.0) -> Teacher:
    return Teacher("fixed", lambda mel, rate, views: torch.tensor([values] * len(mel)), labels=labels, weight=weight)


def answer(teachers: list[Teacher], classes: ClassTable | None = None) -> tuple[ClassTable | None, list[float]]:
    ensemble = Ensemble(teachers, "off", NO_VIEW, RATE, CPU, classes)
    return ensemble.labels, ensemble(noise(1), torch.zeros(1, 2))[0].tolist()


def test_the_mean_of_a_class_is_that_of_the_teachers_that_know_it() -> None:
    first, second = ClassTable(("dog", "cat")), ClassTable(("bell", "Dog"))
    labels, scores = answer([fixed([0.2, 0.4], first), fixed([0.9, 0.8], second, weight=3.0)])
    assert labels == first
    assert scores == pytest.approx([(0.2 + 3 * 0.8) / 4, 0.4])
    asked = ClassTable(("cat", "bell", "owl", "dog"))
    labels, scores = answer([fixed([0.2, 0.4], first), fixed([0.9, 0.8], second)], asked)
    assert labels == asked
    assert scores == pytest.approx([0.4, 0.9, 0.0, 0.5])  # no teacher knows owls


def test_scores_may_exceed_probabilities_by_rounding_alone() -> None:
    assert answer([fixed([1 + 1e-7, -1e-7])])[1] == [1, 0]
    with pytest.raises(StoreError, match=r"not probabilities.* between 0 and 1\.5"):
        answer([fixed([0.0, 1.5])])
    with pytest.raises(StoreError, match=r"not probabilities.* NaN"):
        answer([fixed([0.0, float("nan")])])


def test_teachers_of_different_precisions_are_recorded() -> None:
    save_onnx(Path("small.onnx"))
    meta = ViewStore(run(model=["homemade:half", "onnx:small.onnx"], mode="amp_bf16")).meta
    assert (meta.precision, meta.members) == (
        "mixed",
        ({"precision": "bf16"}, {"takes": "waves", "masks": "waves", "precision": "fp32"}),
    )
    meta = ViewStore(run(model="onnx:small.onnx", mode="amp_bf16")).meta
    assert meta.precision == "fp32"  # ONNX Runtime does not use torch's autocast


def test_weights_change_the_mean_of_teachers_with_one_table() -> None:
    assert answer([fixed([0.0, 1.0]), fixed([1.0, 1.0], weight=3.0)])[1] == pytest.approx([0.75, 1.0])


def test_most_of_the_classes_of_audioset_give_a_store_of_audioset() -> None:
    mids = audioset().mids
    assert mids is not None
    table = ClassTable(tuple(reversed(NAMES[6:])), tuple(reversed(mids[6:])))  # as many as YAMNet has
    labels, scores = answer([fixed([index / 1_000 for index in range(521)], table)])
    assert labels == audioset()
    assert scores == pytest.approx([0.0] * 6 + [index / 1_000 for index in reversed(range(521))])


def test_teachers_without_a_table_need_the_number_of_classes() -> None:
    with pytest.raises(ConfigError, match="fixed has 3 without a class table, the store 2"):
        answer([fixed([0.1, 0.2], ClassTable(("a", "b"))), fixed([0.1, 0.2, 0.3])])
    with pytest.raises(ConfigError, match="gives 3 scores; its class table has 2"):
        answer([fixed([0.1, 0.2, 0.3], ClassTable(("a", "b")))])
    with pytest.raises(ConfigError, match="topk is 2 and the teachers have 1 classes"):
        run(model="homemade:half", classes=_table("bell", "owl"))


def _table(*names: str) -> str:
    Path("classes.csv").write_text("index,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    return "classes.csv"


def test_the_batch_of_a_teacher_may_be_smaller() -> None:
    whole, parts = (
        rows_of(run(model=[{"name": "homemade:energy", "batch_size": size}], outputpath=f"of{size}"))
        for size in (None, 3)
    )
    np.testing.assert_array_equal(whole.indexes, parts.indexes)
    np.testing.assert_allclose(whole.values, parts.values, atol=1e-3)
    assert [len(waves) for waves, *_ in sys.modules["homemade"].calls][-5:] == [3, 1, 3, 1, 2]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"name": "homemade:half", "wieght": 2}, r"model\.0\.wieght: unknown key; did you mean weight"),
        ({"name": "homemade:half", "weight": 0}, r"model\.0\.weight: .*greater than 0"),
        ({"name": "homemade:half", "device": "warp"}, r"the device of a teacher is 'warp'"),
        ({"name": "homemade:half", "device": "meta"}, r"'meta', on which nothing is computed"),
        ({"name": "homemade:half", "activation": "sigmoid"}, r"activation is for models of Transformers"),
        ({"name": "onnx:small.onnx", "mode": "amp"}, r"mode is amp; ONNX graphs"),
        ({"name": "onnx:small.onnx", "activation": "softmax"}, r"set activation in the YAML file"),
        ({"name": "onnx:"}, r"model\.0\.name: should be onnx:FILE"),
        ({"hf": None}, r"model: should be hf:OWNER/NAME or hf:FOLDER"),
        ({"onnx": "small.onnx"}, r"model: should be onnx:FILE, without a space"),
        ({"name": "homemade:half", "mode": "int8"}, r"model\.0\.mode"),
        ({"weight": 2}, r"model\.0\.name: required"),
    ],
)
def test_wrong_entries_are_explained(entry: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run(model=[entry])


def test_graphs_run_on_the_cpu_alone() -> None:
    save_onnx(Path("small.onnx"))
    teacher = load_teacher(TeacherEntry(name="onnx:small.onnx"), {}, torch.device("meta"))
    assert teacher.device == CPU
    with pytest.raises(ConfigError, match="run on the cpu"):
        load_teacher(TeacherEntry(name="onnx:small.onnx", device="meta"), {}, CPU)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("onnx:models/mn04_as.onnx", "onnx:mn04_as"),
        ("onnx:models/mn04_as.yaml", "onnx:mn04_as"),
        ("hf:MIT/ast-finetuned", "hf:MIT/ast-finetuned"),
        ("hf:.", None),
        ("my.teachers:Big.one", "my.teachers:Big.one"),
    ],
)
def test_teachers_are_named(spec: str, name: str | None, tmp_path: Path) -> None:
    assert teacher_name(spec) == (name or f"hf:{tmp_path.name}")


def test_recipes_without_masks_give_views_without_bands() -> None:
    run(model="homemade:energy", spectransforms=None)
    assert all(view == PLAIN for *_, views in sys.modules["homemade"].calls for view in views)
    assert ViewStore(Path("out/homemade_energy/mine/chunk_1")).meta.recipe == ViewRecipe((-0.5, 0.5), None, None)


def test_the_callables_of_the_page_teach() -> None:
    page = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    Path("my_teacher.py").write_text(code)
    folder = run(model=["my_teacher:bright", "my_teacher:loudness"])
    assert ViewStore(folder).meta.labels == ClassTable(("dull", "bright"))
    bright = sys.modules["my_teacher"].bright  # on another device than the CPU, as on a GPU
    assert bright(torch.zeros(2, RATE, device="meta"), RATE, [VIEW, PLAIN]).shape == (2, 2)
    (entries,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    config = check(StoreConfig, {"train_data": "mine.tsv", **yaml.safe_load(entries)}, "the page")
    assert [entry.weight for entry in config.model] == [1, 2, 1]
