"""The table of models, the cache, and what a name or a path stands for."""

import re
from pathlib import Path

import pytest

from ced.errors import CheckpointError, MissingPackageError
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
        "ced_small": (384, 6, address.format(8275319, "small_mAP_4958")),
        "ced_base": (768, 12, address.format(8275347, "base_mAP_4999")),
        "audiotransformer_tiny": (192, 3, address.format(8275347, "tiny_mae_as_10s")),
        "audiotransformer_mini": (256, 4, address.format(8275347, "mini_mae_as_10s")),
        "audiotransformer_small": (384, 6, address.format(8275347, "small_mae_as_10s")),
        "audiotransformer_base": (768, 12, address.format(8275347, "base_mae_as_10s")),
        "audiotransformer_base_4740": (768, 12, address.format(7964975, "base_mAP_47_40")),
    }
    found = {name: (each.width, each.heads, each.zenodo and each.zenodo.url) for name, each in zoo.MODELS.items()}
    assert found == expected
    assert [entry.name for entry in zoo.MODELS.values()] == list(expected)
    assert zoo.list_models() == [*zoo.MODELS, "esc10"]


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert zoo.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("CED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert zoo.cache_dir() == tmp_path / "xdg" / "ced"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert zoo.cache_dir() == tmp_path / "home" / ".cache" / "ced"


def test_the_four_taggers_are_pinned() -> None:
    """Revisions and checksums as several users of the published repositories have pinned them."""
    found = {name: entry.hub for name, entry in zoo.MODELS.items() if entry.hub is not None}
    assert list(found) == ["ced_tiny", "ced_mini", "ced_small", "ced_base"]
    assert {name: hub.repo for name, hub in found.items()} == {
        name: f"mispeech/{name.replace('_', '-')}" for name in found
    }
    assert {hub.revision[:8] for hub in found.values()} == {"ace276d2", "26c3ebca", "06bb40c5", "db3e14a8"}
    assert {hub.sha256[:8] for hub in found.values()} == {"0e086f0c", "e4070d02", "a495e319", "31493569"}
    assert all(re.fullmatch("[0-9a-f]{40}", hub.revision) for hub in found.values())
    assert all(re.fullmatch("[0-9a-f]{64}", hub.sha256) for hub in found.values())


def test_the_checkpoint_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; it needs one of averaged\.safetensors, last"):
        zoo.checkpoint_file(tmp_path)
    for name in ("model.safetensors", "last.safetensors", "averaged.safetensors"):
        (tmp_path / name).write_bytes(b"weights")
        assert zoo.checkpoint_file(tmp_path) == tmp_path / name
    (tmp_path / "averaged.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"averaged\.safetensors is empty"):
        zoo.checkpoint_file(tmp_path)


def test_misspelt_names(tmp_path: Path) -> None:
    assert zoo.local_path("runs/ced_tiny") == Path("runs/ced_tiny")
    assert zoo.local_path("student.pt") == Path("student.pt")
    with pytest.raises(CheckpointError, match="'ced_tinny'; did you mean ced_tiny"):
        zoo.local_path("ced_tinny")


@pytest.mark.parametrize("given", ["", "x" * 300, "~nobody-of-this-name/x"])
def test_neither_a_name_nor_a_path_is_one_error(given: str) -> None:
    with pytest.raises(CheckpointError):
        zoo.checkpoint_file(zoo.local_path(given))


def test_a_folder_means_its_newest_experiment(tmp_path: Path) -> None:
    for folder, name in (
        ("zz", "model.safetensors"),
        ("2026-01-02", "last.safetensors"),
        ("2026-01-01", "averaged.pt"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"weights")
    assert zoo.checkpoint_file(tmp_path) == tmp_path / "2026-01-02" / "last.safetensors"


def test_without_torch_files_that_need_it_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"audiotransformer_tiny.*torch"):
        zoo.fetch("audiotransformer_tiny")
