"""The table of models, the cache, and what a name or a path stands for."""

from pathlib import Path

import pytest

from ced.errors import CheckpointError, DownloadError
from ced.model import zoo


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CED_OFFLINE", "1")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


def test_the_published_names_sizes_and_addresses() -> None:
    address = "https://zenodo.org/records/{}/files/audiotransformer_{}.pt?download=1"
    expected = {
        "ced_tiny": (192, 3, address.format(8275347, "tiny_mAP_4814")),
        "ced_mini": (256, 4, address.format(8275347, "mini_mAP_4896")),
        "ced_small": (384, 6, address.format(8275347, "small_mAP_4958")),
        "ced_base": (768, 12, address.format(8275347, "base_mAP_4999")),
        "audiotransformer_tiny": (192, 3, address.format(8275347, "tiny_mae_as_10s")),
        "audiotransformer_mini": (256, 4, address.format(8275347, "mini_mae_as_10s")),
        "audiotransformer_small": (384, 6, address.format(8275347, "small_mae_as_10s")),
        "audiotransformer_base": (768, 12, address.format(8275347, "base_mae_as_10s")),
        "audiotransformer_base_4740": (768, 12, address.format(7964975, "base_mAP_47_40")),
    }
    found = {name: (each.width, each.heads, each.url) for name, each in zoo.MODELS.items()}
    assert found == expected
    assert [entry.name for entry in zoo.MODELS.values()] == list(expected)
    assert zoo.list_models() == [*zoo.MODELS, "esc10"]
    assert all(entry.file in entry.url for entry in zoo.MODELS.values())


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert zoo.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("CED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert zoo.cache_dir() == tmp_path / "xdg" / "ced"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert zoo.cache_dir() == tmp_path / "home" / ".cache" / "ced"


def test_where_graphs_are_published(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = zoo.MODELS["ced_mini"]
    assert entry.onnx_url == "https://huggingface.co/mispeech/ced-mini/resolve/main/model.onnx"
    assert entry.onnx_file == "ced_mini.onnx"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert entry.onnx_url == "https://mirror.example/mispeech/ced-mini/resolve/main/model.onnx"
    published = [name for name, each in zoo.MODELS.items() if each.onnx_url]
    assert published == ["ced_tiny", "ced_mini", "ced_small", "ced_base"]
    with pytest.raises(CheckpointError, match="no ONNX graph of audiotransformer_base_4740 is published"):
        zoo.fetch_onnx("audiotransformer_base_4740")


def test_a_graph_that_is_not_to_be_had(tmp_path: Path) -> None:
    message = (
        r"ced_tiny is not in the cache \(.*/cache/ced_tiny\.onnx\) and not to be had: cannot fetch https://hugging"
        r".*; without network there is what comes with the package: -m esc10$"
    )
    with pytest.raises(DownloadError, match=message):
        zoo.fetch_onnx("ced_tiny")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ced_tiny.onnx").write_bytes(b"put there by hand")
    assert zoo.fetch_onnx("ced_tiny") == tmp_path / "cache" / "ced_tiny.onnx"


def test_the_checkpoint_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; it needs one of averaged\.safetensors, last"):
        zoo.checkpoint_file(tmp_path)
    for name in ("model.safetensors", "last.safetensors", "averaged.safetensors"):
        (tmp_path / name).write_bytes(b"weights")
        assert zoo.checkpoint_file(tmp_path) == tmp_path / name
    (tmp_path / "averaged.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"averaged\.safetensors is empty"):
        zoo.checkpoint_file(tmp_path)


def test_what_looks_like_a_name_is_taken_for_one(tmp_path: Path) -> None:
    assert zoo.local_path("runs/ced_tiny") == Path("runs/ced_tiny")
    assert zoo.local_path("student.pt") == Path("student.pt")
    with pytest.raises(CheckpointError, match="'ced_tinny'; did you mean ced_tiny"):
        zoo.local_path("ced_tinny")
