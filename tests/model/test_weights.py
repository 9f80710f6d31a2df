"""Checkpoints of every kind: our own, published .pt files and Hugging Face folders, written here for the purpose."""

import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from ced.errors import CheckpointError
from ced.model.config import ModelConfig, Pooling, shapes
from ced.model.loading import build, save
from ced.model.vit import CED
from ced.model.weights import Weights, average, fingerprint, fitted, read
from ced.sound.features import PUBLISHED, FrontEnd, mel_filters
from ced.sound.labels import ClassTable, audioset

CONFIG = ModelConfig(embed_dim=64, num_heads=1, depth=2)
OWN = ClassTable(("dog", "rain", "clock"), ("/m/1", "/m/2", "/m/3"))
HUB_CONFIG = json.loads((Path(__file__).parents[1] / "data" / "hub_configs" / "tiny.json").read_text(encoding="utf-8"))
HUB_NAMES = {name: HUB_CONFIG[name] for name in ("id2label", "label2id")}  # cut at the first comma
WAVES = torch.rand(2, 8_000, generator=torch.Generator().manual_seed(9)) - 0.5


def network(config: ModelConfig = CONFIG, labels: ClassTable | None = None, seed: int = 0) -> CED:
    """Make a network in eval mode with seeded random weights and statistics."""
    generator = torch.Generator().manual_seed(seed)
    model = CED(config, labels)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(0.1 * torch.rand(value.shape, generator=generator) + 0.01)
    return model.eval()


def published(model: CED) -> dict[str, Tensor]:
    """Return the state dict of a published file: the network's and the buffers of its front end."""
    front_end = {
        "front_end.0.spectrogram.window": torch.hann_window(512),
        "front_end.0.mel_scale.fb": torch.tensor(mel_filters(PUBLISHED).T),
    }
    return front_end | {name: value.clone() for name, value in model.state_dict().items()}


def pretrained(model: CED) -> dict[str, Tensor]:
    """Return the state dict of a file of masked pre-training: no head, a decoder, a class token, 62 columns."""
    state = {name: value for name, value in published(model).items() if not name.startswith("outputlayer.")}
    state["time_pos_embed"] = state["time_pos_embed"][..., :62].clone()
    decoder = {
        "decoder_embed.weight": (16, 64),
        "decoder_blocks.0.norm1.weight": (16,),
        "decoder_pos_embed": (1, 16, 4),
    }
    others = {"mask_token": (1, 1, 16), "cls_token": (1, 1, 64), "token_pos_embed": (1, 64)}
    return state | {name: torch.ones(shape) for name, shape in (decoder | others).items()}


def hugging_face(folder: Path, model: CED, **settings: Any) -> Path:
    """Write a Hugging Face folder, with what transformers adds to a configuration."""
    folder.mkdir()
    state = {}
    for name, value in model.state_dict().items():
        prefix = "" if name.startswith("outputlayer.") else "encoder."
        state[prefix + name.replace("init_bn.1.", "init_bn.")] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    names = (
        "embed_dim depth num_heads outputdim target_length pooling n_mels hop_size win_size n_fft f_min f_max center"
    )
    config = {name: getattr(model.config, name) for name in (*names.split(), "pad_last", "eval_avg")}
    config["f_min"], config["f_max"] = 0, 8000  # integers, as JSON written by hand has them
    added = {"architectures": ["CedForAudioClassification"], "model_type": "ced", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | added | settings))
    return folder


def given(state: dict[str, Tensor], source: str = "a.pt") -> Weights:
    """Return a state dict as weights."""
    return Weights({name: value.numpy() for name, value in state.items()}, CONFIG, None, source)


def fill(model: CED, weights: Weights, *, head: bool = True) -> None:
    """Put weights into a network, which keeps what they do not have."""
    arrays = fitted(weights, model.config, head=head)
    model.load_state_dict({name: torch.tensor(value) for name, value in arrays.items()}, strict=False)


def scores(path: Path) -> Tensor:
    with torch.inference_mode():
        result: Tensor = build(read(path))(WAVES)
    return result


@pytest.fixture(scope="module")
def model() -> CED:
    return network()


@pytest.fixture(scope="module")
def expected(model: CED) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(WAVES)
    assert result.std() > 0.001
    return result


class TestOwn:
    def test_save_and_load_round_trip(self, tmp_path: Path) -> None:
        config = replace(CONFIG, outputdim=3, pooling="token", target_length=80, activation="softmax", pad_last=False)
        model = network(config, OWN)
        save(tmp_path / "new" / "folder" / "a.safetensors", model)
        found = read(tmp_path / "new" / "folder" / "a.safetensors")
        assert (found.config, found.labels) == (config, OWN)
        assert found.arrays.keys() == model.state_dict().keys()
        assert all(np.array_equal(value.numpy(), found.arrays[name]) for name, value in model.state_dict().items())
        again = build(found)
        assert not again.training
        assert again.labels == OWN
        assert torch.equal(again(WAVES), model(WAVES))
        assert os.listdir(tmp_path / "new" / "folder") == ["a.safetensors"]

    def test_the_same_network_gives_the_same_bytes(self, tmp_path: Path, model: CED) -> None:
        for name in ("a", "b"):
            save(tmp_path / f"{name}.safetensors", model)
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    def test_a_failed_write_leaves_no_files(self, tmp_path: Path, model: CED) -> None:
        (tmp_path / "a.safetensors").mkdir()
        with pytest.raises(OSError, match=r"a\.safetensors"):
            save(tmp_path / "a.safetensors", model)
        assert os.listdir(tmp_path) == ["a.safetensors"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda header: header.update(format=2), "has format 2; known is 1"),
            (lambda header: header["config"].update(colour="red"), "has unknown settings: colour"),
            (
                lambda header: header["config"].update(depth="many"),
                "contradicts its configuration: depth is 2, not many",
            ),
            (
                lambda header: header["config"].update(embed_dim=10**6),
                "contradicts its configuration: embed_dim is 64, not 1000000",
            ),
            (
                lambda header: header["config"].update(depth=10**6),
                "contradicts its configuration: depth is 2, not 1000000",
            ),
            (lambda header: header["config"].update(n_fft=10**9), "n_fft is 1000000000"),
            (lambda header: header["config"].update(target_length=10**9), "target_length is 1000000000"),
            (lambda header: header["config"].update(pooling="max"), "pooling is 'max'"),
            (lambda header: header.update(sha256="0" * 64), "values do not match its digest"),
            (lambda header: header["classes"].update(names=["a", "b"], mids=None), "damaged header: 2 classes"),
            (lambda header: header.pop("classes"), "damaged header .*classes"),
            (lambda header: header["classes"].update(names=["a", "a", "b"]), "damaged header .*more than once"),
        ],
    )
    def test_invalid_headers(self, tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
        path = tmp_path / "a.safetensors"
        header = {"format": 1, "config": asdict(replace(CONFIG, outputdim=3)), "classes": asdict(OWN)}
        change(header)
        state = network(replace(CONFIG, outputdim=3), OWN).state_dict()
        save_file(state, path, metadata={"ced": json.dumps(header)})
        with pytest.raises(CheckpointError, match=message):
            read(path)

    def test_an_experiment_folder_gives_its_average_or_its_last_checkpoint(self, tmp_path: Path) -> None:
        save(tmp_path / "last.safetensors", network(seed=1))
        assert read(tmp_path).source.endswith("last.safetensors")
        save(tmp_path / "averaged.safetensors", network(seed=2))
        assert read(tmp_path).source.endswith("averaged.safetensors")


class TestPublished:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_raw_state_dict(self, tmp_path: Path, model: CED, expected: Tensor, zipped: bool) -> None:
        torch.save(published(model), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        found = read(tmp_path / "a.pt")
        assert (found.config, found.labels) == (CONFIG, None)
        assert torch.equal(scores(tmp_path / "a.pt"), expected)
        assert build(found).labels == audioset()

    @pytest.mark.parametrize(("width", "heads"), [(192, 3), (256, 4), (384, 6), (768, 12), (64, 1), (32, 1), (96, 1)])
    def test_the_configuration_follows_from_shapes(self, tmp_path: Path, width: int, heads: int) -> None:
        config = ModelConfig(embed_dim=width, num_heads=heads, depth=1, outputdim=9, init_bn=width != 64)
        torch.save(CED(config).state_dict(), tmp_path / "a.pt")
        assert read(tmp_path / "a.pt").config == config

    def test_unusual_settings_follow_from_shapes(self, tmp_path: Path) -> None:
        config = ModelConfig(
            64, 1, depth=1, mlp_ratio=2.0, n_mels=128, n_fft=1024, win_size=800, target_length=320, pooling="token"
        )
        front_end = {
            "front_end.0.spectrogram.window": torch.hann_window(800),
            "front_end.0.mel_scale.fb": torch.tensor(mel_filters(FrontEnd(128, 1024, 800)).T),
        }
        torch.save(CED(config).state_dict() | front_end, tmp_path / "a.pt")
        assert read(tmp_path / "a.pt").config == config

    def test_a_training_configuration_with_paths(self, tmp_path: Path, model: CED, expected: Tensor) -> None:
        config = {
            "outputpath": pathlib.PosixPath("experiments/a"),
            "logfile": pathlib.PureWindowsPath("C:\\logs"),
            "model": "audiotransformer_tiny",
            "model_args": {"pooling": "logit", "target_length": 1008, "unknown": 3},
        }
        torch.save({"model": published(model), "config": config}, tmp_path / "a.pt")
        found = read(tmp_path / "a.pt")
        assert found.config == replace(CONFIG, pooling="logit", target_length=1008)
        torch.testing.assert_close(scores(tmp_path / "a.pt").sigmoid(), expected)

    def test_a_plain_configuration(self, tmp_path: Path) -> None:
        model = network(replace(CONFIG, num_heads=4))  # what no shape tells
        content = {"model": published(model), "config": {"num_heads": 4, "eval_avg": "max", "pooling": None}}
        torch.save(content, tmp_path / "a.pt")
        assert read(tmp_path / "a.pt").config == replace(CONFIG, num_heads=4, eval_avg="max")

    def test_a_configuration_of_another_size(self, tmp_path: Path, model: CED) -> None:
        torch.save({"model": published(model), "config": {"embed_dim": 192}}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="contradicts its configuration: embed_dim is 64, not 192"):
            read(tmp_path / "a.pt")

    def test_masked_pre_training(self, tmp_path: Path, model: CED, caplog: pytest.LogCaptureFixture) -> None:
        torch.save(pretrained(model), tmp_path / "mae.pt")
        found = read(tmp_path / "mae.pt")
        assert not found.has_head
        assert found.config == replace(CONFIG, target_length=992)  # mean pooling in spite of the class token
        started = build(found, target_length=1012)
        assert "no output layer" in caplog.text
        for name, value in model.state_dict().items():
            if name == "time_pos_embed":
                assert started.time_pos_embed.shape == value.shape
            elif not name.startswith("outputlayer."):
                assert torch.equal(started.state_dict()[name], value), name
        with pytest.raises(CheckpointError, match=r"lacks outputlayer\.0\.weight, .*and 1 more$"):
            fill(network(), found)

    def test_the_class_token_of_masked_pre_training_is_used_on_request(self, model: CED) -> None:
        found = given(pretrained(model), "mae.pt")
        student = network(replace(CONFIG, pooling="token", outputdim=3))
        head = student.state_dict()["outputlayer.1.weight"].clone()
        fill(student, found, head=False)
        assert torch.equal(student.cls_token, torch.ones(1, 1, 64))
        assert torch.equal(student.state_dict()["outputlayer.1.weight"], head)


class TestHuggingFace:
    def test_a_folder_or_its_file(self, tmp_path: Path, model: CED, expected: Tensor) -> None:
        folder = hugging_face(tmp_path / "hf", model)
        assert read(folder).config == CONFIG
        assert torch.equal(scores(folder), expected)
        assert torch.equal(scores(folder / "model.safetensors"), expected)

    def test_class_names(self, tmp_path: Path, model: CED) -> None:
        names = {str(index): name for index, name in enumerate(audioset().names)}
        assert read(hugging_face(tmp_path / "a", model, id2label=names)).labels is audioset()
        assert read(hugging_face(tmp_path / "hub", model, **HUB_NAMES)).labels is audioset()
        assert read(hugging_face(tmp_path / "b", model, id2label={"0": "LABEL_0", "1": "LABEL_1"})).labels is None
        small = network(replace(CONFIG, outputdim=2))
        own = read(hugging_face(tmp_path / "c", small, id2label={"1": "cat", "0": "dog"})).labels
        assert own == ClassTable(("dog", "cat"))
        assert read(hugging_face(tmp_path / "d", small, id2label={"0": "dog", "1": "dog"})).labels is None

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"embed_dim": 192}, "embed_dim is 64, not 192"),
            ({"depth": 12}, "depth is 2, not 12"),
            ({"outputdim": 50}, "outputdim is 527, not 50"),
            ({"num_heads": 7}, "embed_dim 64 is not a multiple of num_heads 7"),
            ({"hop_size": "wide"}, "model setting hop_size is 'wide'"),
        ],
    )
    def test_a_configuration_that_does_not_fit(
        self, tmp_path: Path, model: CED, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(CheckpointError, match=message):
            read(hugging_face(tmp_path / "hf", model, **settings))

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_a_damaged_configuration(self, tmp_path: Path, model: CED, text: str) -> None:
        (hugging_face(tmp_path / "hf", model) / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read(tmp_path / "hf")


class Touch:
    """Unpickled by a plain reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Plain:
    """An object that does no harm, but needs its class to be imported."""


class TestRefused:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("place", ["file", "model", "config"])
    def test_a_pickle_with_code(self, tmp_path: Path, model: CED, place: str, zipped: bool) -> None:
        evil = Touch(tmp_path / "made")
        content = {"file": evil, "model": {"model": {"a": evil}}, "config": {"model": published(model), "config": evil}}
        torch.save(content[place], tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"refused: it would execute posix\.mkdir; only weights") as caught:
            read(tmp_path / "a.pt")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "made").exists()
        pickle.loads(pickle.dumps(evil))  # what a plain reader would have done
        assert (tmp_path / "made").exists()

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_a_bare_pickle(self, tmp_path: Path) -> None:
        (tmp_path / "a.pt").write_bytes(pickle.dumps(Touch(tmp_path / "made")))
        with pytest.raises(CheckpointError, match=r"not written by torch\.save"):
            read(tmp_path / "a.pt")
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (Plain(), r"would execute .*Plain"),
            (torch.nn.Linear(2, 2), r"would execute torch\.nn\.modules\.linear\.Linear"),
            ([torch.zeros(2)], "holds a list, not weights"),
            ({}, "holds a dict, not weights"),
            ({"a": 3}, "holds a int under 'a', not a tensor"),
            ({"conv.weight": torch.zeros(2)}, r"not a CED checkpoint: patch_embed\.proj\.weight is missing"),
            (
                {"patch_embed.proj.weight": torch.zeros(2), "time_pos_embed": torch.zeros(2)},
                "time_pos_embed is missing",
            ),
        ],
    )
    def test_other_contents(self, tmp_path: Path, content: object, message: str) -> None:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "a.pt")

    def test_files_that_are_not_checkpoints(self, tmp_path: Path, model: CED) -> None:
        save(tmp_path / "whole.safetensors", model)
        torch.save(published(model), tmp_path / "whole.pt")
        (tmp_path / "folder").mkdir()
        (tmp_path / "empty.pt").touch()
        (tmp_path / "empty.safetensors").touch()
        for suffix in (".pt", ".safetensors"):
            (tmp_path / f"text{suffix}").write_text("version https://git-lfs.github.com/spec/v1\n")
            whole = (tmp_path / f"whole{suffix}").read_bytes()
            (tmp_path / f"half{suffix}").write_bytes(whole[: len(whole) // 2])
        with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
            archive.writestr("notes.txt", "a zip of something else")
        messages = {
            "nothing.pt": "no checkpoint at",
            "folder": "holds no checkpoint; it needs one of averaged.safetensors, last.safetensors",
            "empty.pt": "is empty (0 bytes)",
            "empty.safetensors": "is empty (0 bytes)",
            "text.pt": "is damaged, or not written by torch.save",
            "half.pt": "is damaged",
            "archive.pt": "is damaged",
            "text.safetensors": "is damaged or not a safetensors file",
            "half.safetensors": "is damaged or not a safetensors file",
        }
        for name, message in messages.items():
            with pytest.raises(CheckpointError) as caught:
                read(tmp_path / name)
            assert message in str(caught.value)
            assert str(tmp_path / name) in str(caught.value)
            assert "\n" not in str(caught.value)


class TestBombs:
    """Small files that claim to be large."""

    def test_a_zip_that_unpacks_to_more_than_its_size(self, tmp_path: Path, model: CED) -> None:
        torch.save(published(model), tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w") as packed:
            for entry in plain.infolist():
                data = bytes(1 << 24) if entry.filename.endswith("/data/0") else plain.read(entry)
                packed.writestr(entry.filename, data, zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointError, match="refused: it unpacks to"):
            read(tmp_path / "b.pt")

    def test_a_tensor_that_repeats_one_value(self, tmp_path: Path, model: CED) -> None:
        torch.save(published(model) | {"norm.bias": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"norm\.bias claims 1099511627776 values and stores fewer"):
            read(tmp_path / "a.pt")


class TestArrays:
    @pytest.mark.parametrize("pooling", ["mean", "token"])
    @pytest.mark.parametrize("init_bn", [True, False])
    def test_the_shapes_of_a_configuration_are_those_of_the_network(self, pooling: Pooling, init_bn: bool) -> None:
        config = replace(CONFIG, pooling=pooling, init_bn=init_bn, mlp_ratio=2.3, outputdim=7, target_length=333)
        found = {name: tuple(value.shape) for name, value in CED(config).state_dict().items()}
        assert shapes(config) == found

    def test_bfloat16_becomes_float32(self, tmp_path: Path, model: CED) -> None:
        state = {
            name: value.bfloat16() if value.is_floating_point() else value for name, value in model.state_dict().items()
        }
        save_file(state, tmp_path / "model.safetensors")
        arrays = read(tmp_path).arrays
        for name, value in state.items():
            assert np.array_equal(arrays[name], value.float().numpy() if value.is_floating_point() else value.numpy())

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.bool])
    def test_types_that_weights_do_not_have(self, tmp_path: Path, model: CED, dtype: torch.dtype) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["norm.bias"] = state["norm.bias"].to(dtype)
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read(tmp_path)

    def test_a_graph_is_not_weights(self, tmp_path: Path) -> None:
        (tmp_path / "a.onnx").write_bytes(b"graph")
        with pytest.raises(CheckpointError, match=r"a\.onnx is a graph"):
            read(tmp_path / "a.onnx")

    def test_a_flipped_bit_is_found(self, tmp_path: Path, model: CED) -> None:
        save(tmp_path / "a.safetensors", model)
        content = bytearray((tmp_path / "a.safetensors").read_bytes())
        content[-1_000] ^= 1
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            read(tmp_path / "a.safetensors")

    def test_a_fingerprint_covers_names_types_shapes_and_values(self) -> None:
        first: dict[str, NDArray[Any]] = {"a": np.zeros(4, np.float32), "b": np.ones(2, np.float32)}
        others: list[dict[str, NDArray[Any]]] = [
            {"c": first["a"], "b": first["b"]},
            {"a": first["a"].astype(np.float64), "b": first["b"]},
            {"a": first["a"].reshape(2, 2), "b": first["b"]},
            {"a": first["a"] + 1, "b": first["b"]},
        ]
        assert fingerprint({name: first[name].copy() for name in ("b", "a")}) == fingerprint(first)
        assert len({fingerprint(each) for each in (first, *others)}) == 5

    def test_weights_are_read_without_torch(self, tmp_path: Path, model: CED) -> None:
        save(tmp_path / "a.safetensors", model)
        torch.save(published(model), tmp_path / "audiotransformer_tiny_mAP_4814.pt")
        program = (
            "import sys; sys.modules['torch'] = None\n"
            "from pathlib import Path\n"
            "from ced.errors import MissingPackageError\n"
            "from ced.model.weights import read\n"
            "print(read(Path('a.safetensors')).config.embed_dim)\n"
            "try: read(Path('audiotransformer_tiny_mAP_4814.pt'))\n"
            "except MissingPackageError as error: print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
        width, refusal = done.stdout.splitlines()
        assert width == "64"
        assert "-m ced_tiny" in refusal
        assert "pip install 'ced-audio[train]'" in refusal


class TestFitting:
    def test_every_kind_of_misfit_is_named_and_nothing_is_loaded(self, model: CED) -> None:
        state = published(model) | {"extra.weight": torch.zeros(1), "norm.bias": torch.zeros(65)}
        del state["blocks.1.mlp.fc2.bias"]
        target = network(seed=5)
        before = {name: value.clone() for name, value in target.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            fill(target, given(state))
        assert str(caught.value) == (
            "checkpoint a.pt does not fit the network: it lacks blocks.1.mlp.fc2.bias; has unknown extra.weight; "
            "is of another size: norm.bias (65,), not (64,)"
        )
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())

    def test_a_checkpoint_of_another_size(self, model: CED) -> None:
        wider = CED(replace(CONFIG, embed_dim=128))
        with pytest.raises(CheckpointError, match=r"size: time_pos_embed \(1, 64, 1, 63\), not \(1, 128, 1, 63\)"):
            fill(wider, given(published(model)))
        deeper = CED(replace(CONFIG, depth=3))
        with pytest.raises(CheckpointError, match=r"lacks blocks\.2\.norm1\.weight, .* and 9 more$"):
            fill(deeper, given(published(model)))
        shallower = CED(replace(CONFIG, depth=1))
        with pytest.raises(CheckpointError, match=r"has unknown blocks\.1\.norm1\.weight, .* and 9 more$"):
            fill(shallower, given(published(model)))

    def test_a_batch_norm_is_not_ignored(self, model: CED) -> None:
        without = CED(replace(CONFIG, init_bn=False))
        with pytest.raises(CheckpointError, match=r"has unknown init_bn\.1\.weight"):
            fill(without, given(published(model)))

    def test_another_number_of_classes_needs_head_off(self, model: CED) -> None:
        checkpoint = given(published(model))
        own = network(replace(CONFIG, outputdim=3), OWN, seed=6)
        with pytest.raises(CheckpointError, match=r"outputlayer\.1\.weight \(527, 64\), not \(3, 64\)"):
            fill(own, checkpoint)
        before = {name: value.clone() for name, value in own.state_dict().items()}
        fill(own, checkpoint, head=False)
        for name, value in own.state_dict().items():
            source = before[name] if name.startswith("outputlayer.") else checkpoint.arrays[name]
            assert np.array_equal(value.numpy(), source), name

    @pytest.mark.parametrize("columns", [1, 20, 62, 63, 64, 94, 126])
    def test_time_embeddings_are_cut_or_stretched(self, model: CED, columns: int) -> None:
        resized = build(given(published(model)), target_length=16 * columns)
        old = model.time_pos_embed[0, :, 0].detach().numpy()  # (d, 63)
        if columns <= 63:
            expected = old[:, :columns]
        else:  # linear between the centres of the old columns, level outside them
            places = (np.arange(columns) + 0.5) * 63 / columns - 0.5
            expected = np.stack([np.interp(places, np.arange(63), row) for row in old])
        np.testing.assert_allclose(resized.time_pos_embed[0, :, 0].detach().numpy(), expected, atol=1e-6)

    @pytest.mark.parametrize("rows", [2, 8])
    def test_frequency_embeddings_are_cut_or_stretched(self, model: CED, rows: int) -> None:
        other = CED(replace(CONFIG, n_mels=16 * rows, init_bn=False))
        state = {name: value for name, value in published(model).items() if not name.startswith("init_bn")}
        fill(other, given(state))
        old = model.freq_pos_embed[0, :, :, 0].detach().numpy()  # (d, 4)
        places = (np.arange(rows) + 0.5) * 4 / rows - 0.5 if rows > 4 else np.arange(rows)
        expected = np.stack([np.interp(places, np.arange(4), row) for row in old])
        np.testing.assert_allclose(other.freq_pos_embed[0, :, :, 0].detach().numpy(), expected, atol=1e-6)

    def test_build_changes_settings(self, model: CED) -> None:
        checkpoint = given(published(model))
        assert build(checkpoint, pooling="dm", target_length=320).config == replace(
            CONFIG, pooling="dm", target_length=320
        )
        with pytest.raises(CheckpointError, match=r"lacks cls_token, token_pos_embed$"):
            build(checkpoint, pooling="token")

    def test_half_precision_weights_are_computed_in_float32(self, model: CED) -> None:
        state = {name: value.half() if value.is_floating_point() else value for name, value in published(model).items()}
        loaded = build(given(state))
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


class TestAverage:
    def test_the_mean_of_three(self, tmp_path: Path) -> None:
        config = replace(CONFIG, depth=1, outputdim=3)
        models = [network(config, OWN, seed) for seed in range(3)]
        models[0].state_dict()["init_bn.1.num_batches_tracked"].fill_(7)
        paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
        for path, each in zip(paths, models, strict=True):
            save(path, each)
        mean = average(paths)
        assert (mean.config, mean.labels) == (config, OWN)
        for name, value in mean.arrays.items():
            values = [each.state_dict()[name] for each in models]
            if name.endswith("num_batches_tracked"):
                assert value == 7
            else:
                assert value.dtype == np.float32
                expected = (values[0] + values[1] + values[2]) / 3
                np.testing.assert_allclose(value, expected.numpy(), rtol=1e-6)
        save(tmp_path / "averaged.safetensors", build(mean))
        assert np.array_equal(
            load_file(tmp_path / "averaged.safetensors")["norm.bias"].numpy(), mean.arrays["norm.bias"]
        )

    def test_different_networks_are_not_averaged(self, tmp_path: Path) -> None:
        for index, depth in enumerate((1, 2)):
            save(tmp_path / f"{index}.safetensors", CED(replace(CONFIG, depth=depth, outputdim=3), OWN))
        with pytest.raises(CheckpointError, match=r"0\.safetensors and .*1\.safetensors are of different networks"):
            average([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
        with pytest.raises(CheckpointError, match="no checkpoints to average"):
            average([])
