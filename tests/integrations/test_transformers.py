"""CED in Transformers, through its Auto classes, its pipeline, its Trainer and its hub client."""

import base64
import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from ced.errors import AudioError, ConfigError, MissingPackageError, TableError
from ced.model import loading, weights, zoo
from ced.model.config import ModelConfig
from ced.model.vit import CED
from ced.sound.audio import load as load_sound
from ced.sound.labels import ClassTable, audioset
from ced.tag.tagger import Tagger

pytest.importorskip("transformers")
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import hub

from ced.integrations.transformers import CedConfig, CedFeatureExtractor, CedForAudioClassification, CedModel

SMALL = ModelConfig(embed_dim=64, num_heads=1, depth=1)
OWN = ClassTable(("dog", "rain", "clock"))
HUB_CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
SIZES = ("tiny", "mini", "small", "base")
WAVE = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)


def network(config: ModelConfig, labels: ClassTable | None = None) -> CED:
    """Make a network whose every weight and statistic is its own."""
    torch.manual_seed(0)
    made = CED(config, labels).eval()
    with torch.no_grad():
        for value in (*made.parameters(), *made.buffers()):
            if value.is_floating_point() and all(value is not constant for constant in made.front_end.buffers()):
                value += 0.1 * torch.rand_like(value)
    return made


def hub_config(size: str) -> dict[str, Any]:
    """Return the published config.json of a size, in which class names are cut at the first comma."""
    found: dict[str, Any] = json.loads((HUB_CONFIGS / f"{size}.json").read_text(encoding="utf-8"))
    return found


def published_folder(folder: Path, model: CED, size: str = "tiny") -> Path:
    """Write a folder as the hub has it: its keys, and the published config.json with the network's own shape."""
    folder.mkdir()
    state = {}
    for name, value in model.state_dict().items():
        prefix = "" if name.startswith("outputlayer.") else "encoder."
        state[prefix + name.replace("init_bn.1.", "init_bn.")] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    names = "embed_dim depth num_heads outputdim target_length pooling n_mels hop_size win_size n_fft center pad_last"
    settings = hub_config(size) | {name: getattr(model.config, name) for name in names.split()}
    (folder / "config.json").write_text(json.dumps(settings))
    features = {
        "auto_map": {"AutoFeatureExtractor": "feature_extraction_ced.CedFeatureExtractor"},
        "feature_extractor_type": "CedFeatureExtractor",
        **{name: settings[name] for name in ("f_max", "f_min", "hop_size", "n_fft", "n_mels", "win_size", "center")},
        "feature_size": 64,
        "padding_value": 0.0,
        "sampling_rate": 16_000,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(features))
    return folder


@pytest.fixture(scope="module")
def tagger() -> CED:
    return network(SMALL)


@pytest.fixture(scope="module")
def folder(tagger: CED, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(tmp_path_factory.mktemp("hub") / "ced-small", tagger)


def weight(model: CED, name: str) -> Tensor:
    value: Tensor = model.state_dict()[name]
    return value


def assert_same(found: CED, expected: CED) -> None:
    """Compare every weight, bit for bit, and the front end."""
    theirs, ours = found.state_dict(), expected.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in (*ours.items(), *expected.front_end.named_buffers("front_end")):
        assert torch.equal(found.get_buffer(name) if name.startswith("front_end") else theirs[name], value), name


class TestFolders:
    def test_a_published_folder_is_read_by_the_auto_classes(self, folder: Path, tagger: CED) -> None:
        model = AutoModelForAudioClassification.from_pretrained(folder)
        assert isinstance(model, CedForAudioClassification)
        assert not model.training
        assert_same(model.network, tagger)
        assert model.network.labels is audioset()
        assert model.config.problem_type == "multi_label_classification"
        assert isinstance(AutoConfig.from_pretrained(folder), CedConfig)
        assert isinstance(AutoFeatureExtractor.from_pretrained(folder), CedFeatureExtractor)

    def test_remote_code_is_never_executed(self, folder: Path) -> None:
        model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)
        assert type(model) is CedForAudioClassification

    def test_saved_folders_have_the_published_layout(self, folder: Path, tagger: CED, tmp_path: Path) -> None:
        AutoModelForAudioClassification.from_pretrained(folder).save_pretrained(tmp_path / "loaded")
        CedForAudioClassification.from_network(tagger).save_pretrained(tmp_path / "made")
        AutoFeatureExtractor.from_pretrained(folder).save_pretrained(tmp_path / "made")
        published = load_file(folder / "model.safetensors")
        for saved in (tmp_path / "loaded", tmp_path / "made"):
            state = load_file(saved / "model.safetensors")
            assert state.keys() == published.keys()
            assert all(torch.equal(state[name], value) for name, value in published.items())
        for name in ("config.json", "preprocessor_config.json"):
            theirs = json.loads((folder / name).read_text())
            ours = json.loads((tmp_path / "made" / name).read_text())
            # Written by nobody else: settings of the published code that the network does not have. `dtype` is the
            # new name of `torch_dtype`.
            ignored = {"auto_map", "torch_dtype", "transformers_version", "name", "qkv_bias"}
            ignored |= {"drop_rate", "attn_drop_rate", "drop_path_rate", "patch_size", "patch_stride"}
            if name == "config.json":
                full = audioset().names
                assert ours.pop("id2label") == {str(index): name for index, name in enumerate(full)}
                assert ours.pop("label2id") == {name: index for index, name in enumerate(full)}
                ignored |= {"id2label", "label2id"}
            assert {key: ours[key] for key in theirs.keys() - ignored} == {
                key: theirs[key] for key in theirs.keys() - ignored
            }
            assert "auto_map" not in ours

    def test_checkpoints_convert_in_both_directions(self, tmp_path: Path) -> None:
        own = network(
            replace(SMALL, activation="softmax", pooling="token", eval_avg="max", outputdim=3, target_length=320), OWN
        )
        loading.save(tmp_path / "own.safetensors", own)
        read = loading.load_model(tmp_path / "own.safetensors")
        CedForAudioClassification.from_network(read).save_pretrained(tmp_path / "hub")
        from_hub = loading.load_model(tmp_path / "hub")
        assert_same(from_hub, own)
        assert (from_hub.config, from_hub.labels) == (own.config, own.labels)
        back = CedForAudioClassification.from_pretrained(tmp_path / "hub").network
        loading.save(tmp_path / "back.safetensors", back)
        assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "own.safetensors").read_bytes()

    def test_an_encoder_is_saved_under_the_same_names(self, folder: Path, tagger: CED, tmp_path: Path) -> None:
        encoder = AutoModel.from_pretrained(folder)
        assert isinstance(encoder, CedModel)
        encoder.save_pretrained(tmp_path / "encoder")
        assert {name.split(".")[0] for name in load_file(tmp_path / "encoder" / "model.safetensors")} == {"encoder"}
        again = CedForAudioClassification.from_pretrained(tmp_path / "encoder")
        assert torch.equal(
            weight(again.network, "blocks.0.attn.qkv.weight"), weight(tagger, "blocks.0.attn.qkv.weight")
        )
        assert 0.01 < float(weight(again.network, "outputlayer.1.weight").std()) < 0.03  # fresh

    def test_another_number_of_classes_gets_a_new_output_layer(self, folder: Path, tagger: CED) -> None:
        names = dict(enumerate(OWN.names))
        model = AutoModelForAudioClassification.from_pretrained(
            folder, id2label=names, problem_type="single_label_classification", ignore_mismatched_sizes=True
        )
        assert (model.config.outputdim, model.network.labels) == (3, OWN)
        assert model.network.config == replace(SMALL, outputdim=3, activation="softmax")
        assert 0.005 < float(weight(model.network, "outputlayer.1.weight").std()) < 0.04
        assert not weight(model.network, "outputlayer.1.bias").any()
        for kept in ("outputlayer.0.weight", "init_bn.1.running_mean"):
            assert torch.equal(weight(model.network, kept), weight(tagger, kept))
        counted = AutoModelForAudioClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
        assert counted.network.labels.names == ("class 0", "class 1")

    def test_edited_classes_are_kept(self, folder: Path) -> None:
        config = CedConfig(id2label={0: "a", 1: "b"}, outputdim=527)
        assert (config.labels.names, config.outputdim, config.label2id) == (("a", "b"), 2, {"a": 0, "b": 1})
        changed = CedConfig.from_pretrained(folder, id2label={0: "a", 1: "b"})
        assert changed.to_dict()["label2id"] == {"a": 0, "b": 1}
        with pytest.raises(ConfigError, match=r"keys 0, 5; they must be 0 to 1"):
            _ = CedConfig(id2label={0: "a", 5: "b"}).labels

    def test_16_bits_tag_as_32(self, folder: Path, tagger: CED) -> None:
        half = CedForAudioClassification.from_pretrained(folder, dtype=torch.bfloat16).network.eval()
        assert weight(half, "outputlayer.1.weight").dtype == torch.bfloat16
        waves = torch.from_numpy(WAVE)[None]
        assert torch.equal(half.front_end(waves), tagger.front_end(waves))
        with Tagger(half) as one, Tagger(tagger) as other:
            (found,), (expected,) = (list(each.tag((WAVE, 16_000), top_k=527)) for each in (one, other))
        scores = {tag.label: tag.prob for tag in expected.tags}
        assert {tag.label: tag.prob for tag in found.tags} == pytest.approx(scores, abs=0.02)

    def test_a_configuration_alone_makes_a_fresh_network(self) -> None:
        config = CedConfig(embed_dim=64, num_heads=1, depth=1)
        assert (config.num_labels, config.hidden_size, config.labels) == (527, 64, audioset())
        fresh = CedForAudioClassification(config).network
        assert 0.015 < float(weight(fresh, "blocks.0.mlp.fc1.weight").std()) < 0.022
        assert 0.015 < float(weight(fresh, "time_pos_embed").std()) < 0.025
        assert float(weight(fresh, "patch_embed.proj.weight").abs().max()) <= 1 / 16  # as torch draws a convolution

    def test_invalid_configurations_of_a_network(self) -> None:
        with pytest.raises(ConfigError, match="embed_dim 64 is not a multiple of num_heads 3"):
            CedModel(CedConfig(embed_dim=64, num_heads=3))
        with pytest.raises(ConfigError, match="problem_type is 'regression'; allowed: multi_label_classification, "):
            CedModel(CedConfig(problem_type="regression"))


class TestPublishedConfigs:
    """The config.json of the four published models as they are, with their cut class names."""

    @pytest.mark.parametrize("size", SIZES)
    def test_names_are_restored(self, size: str) -> None:
        cut = hub_config(size)["id2label"]
        assert (cut["1"], cut["506"], cut["507"], cut["508"]) == ("Male speech", "Inside", "Inside", "Inside")
        config = CedConfig(**hub_config(size))
        assert config.id2label == dict(enumerate(audioset().names))
        assert config.label2id == {name: index for index, name in enumerate(audioset().names)}
        assert (config.labels, config.outputdim) == (audioset(), 527)
        assert config.network == zoo.MODELS[f"ced_{size}"].config
        assert config.to_dict()["id2label"][1] == "Male speech, man speaking"

    @pytest.mark.parametrize("size", SIZES)
    def test_each_size_loads(self, size: str, tmp_path: Path) -> None:
        model = network(replace(zoo.MODELS[f"ced_{size}"].config, depth=1))
        folder = published_folder(tmp_path / size, model, size)
        loaded = AutoModelForAudioClassification.from_pretrained(folder)
        assert_same(loaded.network, model)
        assert loaded.network.labels is audioset()
        assert weights.read(folder).labels is audioset()

    def test_tiny_at_its_full_size(self, tmp_path: Path) -> None:
        model = network(zoo.MODELS["ced_tiny"].config)
        folder = published_folder(tmp_path / "tiny", model)
        assert json.loads((folder / "config.json").read_text()) == hub_config("tiny")  # nothing had to be changed
        classify = pipeline("audio-classification", model=str(folder))
        found = {each["label"]: each["score"] for each in classify(WAVE, top_k=527)}
        with torch.inference_mode():
            probs = model.probs(torch.from_numpy(WAVE)[None])[0]
        assert found == pytest.approx(dict(zip(audioset().names, probs.tolist(), strict=True)), abs=1e-6)
        classify.model.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert saved["id2label"]["1"] == "Male speech, man speaking"
        assert len(saved["label2id"]) == 527
        again = AutoModelForAudioClassification.from_pretrained(tmp_path / "saved")
        assert_same(again.network, model)
        assert again.config.id2label == dict(enumerate(audioset().names))

    def test_the_pipeline_prints_full_names(self, tagger: CED, tmp_path: Path) -> None:
        speech = CED(SMALL, tagger.labels).eval()
        speech.load_state_dict(tagger.state_dict())
        with torch.no_grad():
            speech.state_dict()["outputlayer.1.bias"][1] = 100.0
        classify = pipeline("audio-classification", model=str(published_folder(tmp_path / "speech", speech)))
        assert classify(WAVE, top_k=1)[0]["label"] == "Male speech, man speaking"

    def test_names_of_other_tables_stay(self) -> None:
        names = {int(index): name for index, name in hub_config("tiny")["id2label"].items()}
        assert CedConfig(id2label={0: "Male speech", 1: "Inside"}).id2label == {0: "Male speech", 1: "Inside"}
        with pytest.raises(TableError, match="'Inside'"):
            _ = CedConfig(id2label=names | {1: "Other speech"}).labels


class TestFeatures:
    def test_features_are_those_of_the_network(self, tagger: CED) -> None:
        found = CedFeatureExtractor()(WAVE, sampling_rate=16_000)["input_values"]
        assert found.dtype == np.float32
        assert np.array_equal(found, tagger.front_end(torch.from_numpy(WAVE)[None]).numpy())

    def test_unequal_waves_are_padded_with_silence(self, tagger: CED) -> None:
        found = CedFeatureExtractor()([WAVE, WAVE[:9_000]], return_tensors="pt")["input_values"]
        silent = torch.from_numpy(np.stack([WAVE, np.pad(WAVE[:9_000], (0, 7_000))]))
        assert torch.equal(found, tagger.front_end(silent))

    def test_a_wave_shorter_than_a_patch_is_padded(self) -> None:
        assert CedFeatureExtractor()([0.1] * 10)["input_values"].shape == (1, 64, 16)

    @pytest.mark.parametrize(
        ("waves", "rate", "message"),
        [
            (WAVE, 44_100, "the waves have 44100 Hz; resample them to 16000"),
            (np.zeros(100, np.int16), 16_000, "a wave is int16 (100,); it must be mono floats in [-1, 1], (samples,)"),
            (np.zeros((2, 100, 2), np.float32), 16_000, "a wave is float32 (100, 2); it must be mono floats"),
            ([], None, "no waves were given"),
            ([np.zeros(0, np.float32)], None, "a wave is float32 (0,); it must be mono floats"),
        ],
    )
    def test_invalid_waves_are_refused(self, waves: Any, rate: int | None, message: str) -> None:
        with pytest.raises(AudioError) as caught:
            CedFeatureExtractor()(waves, sampling_rate=rate)
        assert str(caught.value).startswith(message)

    def test_truncation_and_padding(self, tagger: CED) -> None:
        both = CedFeatureExtractor()([WAVE, WAVE[:8000]], max_length=12_000, truncation=True)["input_values"]
        assert np.array_equal(both[0], CedFeatureExtractor()(WAVE[:12_000])["input_values"][0])
        one = CedFeatureExtractor()(WAVE, max_length=32_000, padding="max_length")["input_values"]
        assert one.shape == (1, 64, 201)
        with pytest.raises(ConfigError, match="need a max_length"):
            CedFeatureExtractor()(WAVE, truncation=True)
        with pytest.raises(ConfigError, match="padding is 'most'"):
            CedFeatureExtractor()(WAVE, padding="most")  # type: ignore[arg-type]
        with pytest.raises(AudioError, match="8000 to 16000 samples, and padding is False"):
            CedFeatureExtractor()([WAVE, WAVE[:8000]], padding=False)

    def test_the_default_collator(self, folder: Path) -> None:
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        rows = [
            {"input_values": extractor(wave)["input_values"][0], "label": label}
            for label, wave in enumerate((WAVE, -WAVE))
        ]
        batch = DataCollatorWithPadding(extractor)(rows)
        assert {name: tuple(values.shape) for name, values in batch.items()} == {
            "input_values": (2, 64, 101),
            "labels": (2,),
        }
        rows[1]["input_values"] = extractor(WAVE[:8000])["input_values"][0]
        with pytest.raises(AudioError, match=r"features of \(64, 51\) to \(64, 101\) cannot be collated"):
            DataCollatorWithPadding(extractor)(rows)

    def test_another_rate_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="sampling_rate is 8000; it must be 16000"):
            CedFeatureExtractor(sampling_rate=8_000)


class TestScores:
    def test_the_pipeline_gives_the_probabilities_of_ced_tag(self, folder: Path, tagger: CED) -> None:
        long = np.random.default_rng(1).uniform(-1, 1, 200_000).astype(np.float32)  # two pieces
        classify = pipeline("audio-classification", model=str(folder))
        for wave in (WAVE, WAVE[:1_000], long):
            found = {each["label"]: each["score"] for each in classify(wave, top_k=527)}
            (scored,) = Tagger(tagger).score((wave, 16_000), window=20.0)
            expected = dict(zip(audioset().names, scored.probs.tolist(), strict=True))
            assert found == pytest.approx(expected, abs=1e-6)

    def test_single_label_problems_have_a_softmax(self, tmp_path: Path) -> None:
        single = network(replace(SMALL, outputdim=3, activation="softmax"), OWN)
        CedForAudioClassification.from_network(single).save_pretrained(tmp_path)
        CedFeatureExtractor().save_pretrained(tmp_path)
        found = {each["label"]: each["score"] for each in pipeline("audio-classification", model=str(tmp_path))(WAVE)}
        probs = single.probs(torch.from_numpy(WAVE)[None])[0].tolist()
        assert found == pytest.approx(dict(zip(OWN.names, probs, strict=True)), abs=1e-6)
        assert sum(found.values()) == pytest.approx(1)

    def test_embeddings_are_the_tokens_after_the_last_norm(self, folder: Path, tagger: CED) -> None:
        mel = tagger.front_end(torch.from_numpy(WAVE)[None])
        read = []
        hook = tagger.norm.register_forward_hook(lambda _module, _given, tokens: read.append(tokens))
        tagger.forward_mel(mel)
        hook.remove()
        output = AutoModel.from_pretrained(folder)(mel)
        torch.testing.assert_close(output.last_hidden_state, read[0])
        torch.testing.assert_close(output.pooler_output, read[0].mean(1))
        hidden, pooled = AutoModel.from_pretrained(folder)(mel, return_dict=False)
        assert (hidden.shape, pooled.shape) == ((1, 24, 64), (1, 64))


class TestLoss:
    MEL = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))

    def model(self, activation: str) -> CedForAudioClassification:
        config = replace(SMALL, outputdim=3, activation=activation)  # type: ignore[arg-type]
        return CedForAudioClassification.from_network(network(config, OWN))

    def test_several_labels(self) -> None:
        targets = torch.tensor([[1, 0, 0.5], [0, 0, 1]])
        output = self.model("sigmoid")(self.MEL, labels=targets)
        probs = output.logits.sigmoid()
        expected = -(targets * probs.log() + (1 - targets) * (1 - probs).log()).mean()
        torch.testing.assert_close(output.loss, expected)
        assert torch.equal(self.model("sigmoid")(self.MEL, labels=targets > 0.7).loss, self.loss(targets > 0.7))

    def loss(self, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.model("sigmoid")(self.MEL).logits, targets.float())

    def test_one_label(self) -> None:
        output = self.model("softmax")(self.MEL, labels=torch.tensor([2, 0]))
        probs = output.logits.softmax(-1)
        torch.testing.assert_close(output.loss, -(probs[0, 2].log() + probs[1, 0].log()) / 2)

    @pytest.mark.parametrize(
        ("activation", "labels", "message"),
        [
            ("sigmoid", torch.tensor([1, 2]), r"shape \(2,\); for multi_label_classification .* \(2, 3\)"),
            ("softmax", torch.zeros(2, 3), r"shape \(2, 3\); for single_label_classification .* \(2,\)"),
        ],
    )
    def test_labels_of_the_other_kind_are_refused(self, activation: str, labels: Tensor, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.model(activation)(self.MEL, labels=labels)


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload of small files uses."""

    pushed: dict[str, bytes]
    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(f"GET {self.path}")
        self.answer({}, 404)  # there is no model card yet

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.paths.append(f"POST {self.path.split('?')[0]}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.pushed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.address}/me/mine/commit/0", "commitOid": "0" * 40})
        else:
            self.answer({"url": f"{self.address}/me/mine", "name": "me/mine", "id": "0"})

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests clean."""


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HubHandler]]:
    handler = type("Handler", (HubHandler,), {"pushed": {}, "paths": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub, "_hf_api", hub.HfApi(endpoint=address))
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_to_hub(hub_server: type[HubHandler], folder: Path, tagger: CED, tmp_path: Path) -> None:
    CedForAudioClassification.from_network(tagger).push_to_hub("me/mine", token="secret")
    CedFeatureExtractor().push_to_hub("me/mine", token="secret")
    assert "POST /api/models/me/mine/commit/main" in hub_server.paths
    assert hub_server.pushed.keys() >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    published = load_file(folder / "model.safetensors")
    pushed = load(hub_server.pushed["model.safetensors"])
    assert pushed.keys() == published.keys()
    assert all(torch.equal(pushed[name], value) for name, value in published.items())
    for name, content in hub_server.pushed.items():
        (tmp_path / name).write_bytes(content)
    assert_same(AutoModelForAudioClassification.from_pretrained(tmp_path).network, tagger)


@pytest.mark.skipif("CED_ESC10" not in os.environ, reason="CED_ESC10 names no copy of ESC-10")
def test_the_trainer_fine_tunes_it_on_esc10(tmp_path: Path) -> None:
    folder = Path(os.environ["CED_ESC10"])
    rows = [line.split("\t") for line in (folder / "meta.tsv").read_text().splitlines()[1:]]
    names = ("Dog bark", "Rain")
    waves = [
        (load_sound(folder / "audio" / filename), label)
        for label, wanted in enumerate(names)
        for filename, fold, _, name in rows
        if (fold, name) == ("1", wanted)
    ]
    extractor = CedFeatureExtractor()
    assert len(waves) == 16

    def collate(rows: list[tuple[NDArray[np.float32], int]]) -> dict[str, Tensor]:
        batch = extractor([wave for wave, _ in rows], sampling_rate=16_000, return_tensors="pt")
        return {**batch, "labels": torch.tensor([label for _, label in rows])}

    start = CED(SMALL)
    statistics = start.init_bn[0]
    assert isinstance(statistics, nn.BatchNorm1d)
    statistics.momentum = 1.0  # as a trained network has them
    start.init_bn(collate(waves)["input_values"])
    published_folder(tmp_path / "start", start)
    model = AutoModelForAudioClassification.from_pretrained(
        tmp_path / "start",
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification",
        ignore_mismatched_sizes=True,
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,  # rows are made into features by `collate`
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=waves, data_collator=collate, processing_class=extractor
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 0.5
    assert np.mean(losses[-3:]) < 0.3
    trainer.save_model(tmp_path / "mine")
    classify = pipeline("audio-classification", model=str(tmp_path / "mine"))
    ours = Tagger(str(tmp_path / "mine"))  # `ced tag -m` takes the folder as it is
    right = 0
    for wave, label in waves:
        best = classify(wave, top_k=1)[0]
        right += best["label"] == names[label]
        (scored,) = ours.score((wave, 16_000))
        assert float(scored.probs.max()) == pytest.approx(best["score"], abs=1e-4)
        assert ours.labels.names == names
    assert right >= 14


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ced.integrations.transformers")
    needed = r"ced\.integrations\.transformers .* transformers: pip install 'ced-audio\[hf\]'"
    with pytest.raises(MissingPackageError, match=needed):
        importlib.import_module("ced.integrations.transformers")


def test_a_version_whose_pipeline_gives_other_probabilities_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.22.2")
    monkeypatch.delitem(sys.modules, "ced.integrations.transformers")
    with pytest.raises(ConfigError, match=r"needs Transformers 5\.23 or newer, 5\.22\.2 is"):
        importlib.import_module("ced.integrations.transformers")
