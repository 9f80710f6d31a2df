"""Networks made from names and files, with a server on this machine in the place of Zenodo."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ced.errors import CheckpointError, ConfigError, DownloadError
from ced.model import download, loading, zoo
from ced.model.config import ModelConfig
from ced.model.vit import CED
from ced.sound.labels import ClassTable, audioset

SMALL = ModelConfig(embed_dim=64, num_heads=1, depth=1)
OWN = ClassTable(("dog", "rain", "clock"))


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests clean."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CED_OFFLINE", "1")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CED]:
    """Serve small networks as files of Zenodo under names of the zoo; return the one of "ced_tiny"."""
    folder = tmp_path / "site" / "records" / "8275347" / "files"
    folder.mkdir(parents=True)
    tagger = CED(SMALL).eval()
    torch.save(tagger.state_dict(), folder / "tagger.pt")
    pretrained = {name: value + 1 for name, value in tagger.state_dict().items() if not name.startswith("outputlayer.")}
    torch.save(pretrained | {"mask_token": torch.zeros(1, 1, 64)}, folder / "mae.pt")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path / "site")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    files = {"ced_tiny": "tagger.pt", "audiotransformer_tiny": "mae.pt", "ced_mini": "missing.pt"}
    entries = {
        name: replace(zoo.MODELS[name], width=64, heads=1, hub=None, zenodo=zoo.Zenodo(8275347, file))
        for name, file in files.items()
    }
    monkeypatch.setattr(zoo, "ZENODO", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(zoo, "MODELS", entries)
    monkeypatch.setenv("CED_OFFLINE", "0")
    yield tagger
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_name_is_downloaded_once(served: CED, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[tuple[str, int, int]] = []
    model = loading.load_model("ced_tiny", progress=lambda *report: reports.append(report))
    assert (cache / "tagger.pt").stat().st_size == reports[-1][1] == reports[-1][2]
    assert not model.training
    assert model.labels is audioset()
    wave = torch.rand(1, 4_000)
    assert torch.equal(model(wave), served(wave))
    monkeypatch.setenv("CED_OFFLINE", "1")
    other = loading.load_model("ced_tiny", pooling="logit", target_length=320)
    assert other.config == replace(SMALL, pooling="logit", target_length=320)


def test_offline_errors_name_the_file_and_the_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match=r"ced_base is not cached: .*CED_OFFLINE.*8275347.*CED_OFFLINE.*-m esc10$"):
        loading.load_model("ced_base")


def test_a_file_put_into_the_cache_by_hand(served: CED, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CED_OFFLINE", "1")
    cache.mkdir()
    torch.save(served.state_dict(), cache / "missing.pt")
    assert zoo.fetch("ced_mini") == cache / "missing.pt"
    assert loading.load_model("ced_mini").config == SMALL


def test_a_missing_file_on_the_server(served: CED) -> None:
    with pytest.raises(DownloadError, match=r"no Zenodo record of ced_mini has missing\.pt"):
        zoo.fetch("ced_mini")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "ced_tinny",
            r"^no model and no file is named 'ced_tinny'; did you mean ced_tiny.*; known: ",
        ),
        ("zebra", r"'zebra'; known: .*audiotransformer_base_4740, esc10$"),
        ("esc10", "esc10 is a graph in the package, without the weights"),
        ("runs/ced_tiny", "no checkpoint at runs/ced_tiny$"),
        ("student.pt", r"no checkpoint at student\.pt$"),
        (Path("ced_tiny"), "no checkpoint at ced_tiny$"),
    ],
)
def test_neither_a_name_nor_a_path(given: str | Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        loading.load_model(given)


def test_a_path(tmp_path: Path) -> None:
    student = CED(replace(SMALL, outputdim=3), OWN)
    loading.save(tmp_path / "run" / "averaged.safetensors", student)
    for path in (tmp_path / "run", str(tmp_path / "run" / "averaged.safetensors")):
        assert loading.load_model(path).labels == OWN


class TestCreate:
    def state(self, model: CED, name: str) -> Tensor:
        value: Tensor = model.state_dict()[name]
        return value

    def test_fresh(self) -> None:
        args = {"depth": 1, "pooling": "logit", "target_length": 320}
        model = loading.create("ced_tiny", model_args=args, pretrained=False, labels=OWN)
        assert model.config == replace(
            ModelConfig(embed_dim=192, num_heads=3), depth=1, pooling="logit", target_length=320, outputdim=3
        )
        assert model.labels == OWN
        assert model.training

    def test_from_masked_pre_training(self, served: CED) -> None:
        args = {"depth": 1, "pooling": "logit", "target_length": 512}
        model = loading.create("audiotransformer_tiny", model_args=args, pretrained=True, labels=audioset())
        assert torch.equal(self.state(model, "norm.bias"), self.state(served, "norm.bias") + 1)
        assert torch.equal(self.state(model, "time_pos_embed"), self.state(served, "time_pos_embed")[..., :32] + 1)
        assert self.state(model, "outputlayer.1.bias").sigmoid() == pytest.approx(1 / 527)  # one class of all

    def test_from_a_tagger_of_the_same_classes(self, served: CED) -> None:
        model = loading.create("ced_tiny", model_args={"depth": 1}, pretrained=True, labels=audioset())
        assert all(torch.equal(value, self.state(model, name)) for name, value in served.state_dict().items())

    def test_from_a_tagger_of_other_classes(self, served: CED) -> None:
        model = loading.create("ced_tiny", model_args={"depth": 1}, pretrained=True, labels=OWN)
        assert torch.equal(
            self.state(model, "blocks.0.attn.qkv.weight"), self.state(served, "blocks.0.attn.qkv.weight")
        )
        assert self.state(model, "outputlayer.1.weight").shape == (3, 64)

    def test_classes_must_agree_by_name_not_by_number(self, tmp_path: Path) -> None:
        student = CED(replace(SMALL, outputdim=3), OWN)
        loading.save(tmp_path / "a.safetensors", student)
        args = {"embed_dim": 64, "num_heads": 1, "depth": 1}
        for names, kept in ((OWN.names, True), (("dog", "clock", "rain"), False)):
            model = loading.create(
                "ced_tiny", model_args=args, pretrained=str(tmp_path / "a.safetensors"), labels=ClassTable(names)
            )
            head = self.state(model, "outputlayer.1.weight")
            assert torch.equal(head, self.state(student, "outputlayer.1.weight")) is kept
            assert torch.equal(self.state(model, "norm.bias"), self.state(student, "norm.bias"))

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"target_lenght": 1}, "unknown model setting 'target_lenght'; did you mean target_length"),
            ({"depth": "deep"}, "model setting depth is 'deep'"),
            ({"embed_dim": 100}, "embed_dim 100 is not a multiple of num_heads 3"),
            ({"outputdim": 527}, "outputdim is 527, but there are 3 classes"),
        ],
    )
    def test_wrong_arguments(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            loading.create("ced_tiny", model_args=args, pretrained=False, labels=OWN)

    def test_a_checkpoint_of_another_size(self, served: CED) -> None:
        with pytest.raises(CheckpointError, match=r"tagger\.pt does not fit the network: it lacks blocks\.1\.norm1"):
            loading.create("ced_mini", model_args={"depth": 2}, pretrained="ced_tiny", labels=audioset())

    def test_a_checkpoint_gives_configuration_and_initial_weights(self, tmp_path: Path) -> None:
        student = CED(replace(SMALL, outputdim=3, activation="softmax"), OWN)
        loading.save(tmp_path / "run" / "averaged.safetensors", student)
        model = loading.create(str(tmp_path / "run"), model_args={"pooling": "logit"}, pretrained=True, labels=OWN)
        assert model.config == replace(student.config, pooling="logit")
        assert all(torch.equal(value, self.state(model, name)) for name, value in student.state_dict().items())

    def test_an_unknown_name(self) -> None:
        with pytest.raises(CheckpointError, match="'ced_huge'"):
            loading.create("ced_huge", model_args={}, pretrained=False, labels=OWN)


def test_the_other_record_is_tried_on_a_404(served: CED, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(zoo.MODELS["ced_tiny"], zenodo=zoo.Zenodo(8275319, "tagger.pt"))
    monkeypatch.setattr(zoo, "MODELS", {"ced_small": entry})
    assert zoo.fetch("ced_small") == cache / "tagger.pt"


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>Just a moment</html>", b"", b"PK\x03\x04 and no more"])
def test_a_file_that_is_not_a_checkpoint_is_not_cached(
    served: CED, cache: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "site/records/8275347/files/missing.pt").write_bytes(content)
    with pytest.raises(DownloadError, match=r"missing\.pt.* is not the published file: .*torch\.save; removed"):
        zoo.fetch("ced_mini")
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []
