"""Published models from a server on this machine that plays the hub."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ced.errors import ChecksumError, DownloadError
from ced.model import download, loading, zoo
from ced.model.vit import CED
from ced.sound.labels import audioset
from tests.local_hub import LocalHub, hub_weights, published, random_network, running


@pytest.fixture(scope="module")
def network() -> CED:
    return random_network("ced_tiny")


@pytest.fixture
def site(network: CED, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The hub with `ced_tiny`, empty caches, and a Zenodo that cannot be reached."""
    monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # the client waits before retries
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("CED_OFFLINE", raising=False)

    def unreachable(*_: object, **__: object) -> None:
        raise DownloadError("Zenodo cannot be reached")

    monkeypatch.setattr(download, "download", unreachable)
    with running(LocalHub()) as site:
        monkeypatch.setattr(zoo, "MODELS", published(site, {"ced_tiny": network}))
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        yield site


def cached_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.stat().st_size > 1_000]


def test_a_name_downloads_its_pinned_revision_once(site: LocalHub, network: CED) -> None:
    reports: list[tuple[str, int, int]] = []
    found = loading.load_model("ced_tiny", progress=lambda *report: reports.append(report))
    assert found.labels is audioset()
    for key, value in network.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    pinned = "ace276d29dd0bb3f3517b0fa8cf300738c409019"
    assert {each.split("/")[4] for each in site.requests if "/resolve/" in each} == {pinned}
    size = len(site.files["mispeech/ced-tiny", "model.safetensors"])
    assert reports[-1] == ("download mispeech/ced-tiny", size, size)
    asked = len(site.requests)
    loading.load_model("ced_tiny")
    assert len(site.requests) == asked


def test_a_cut_connection_resumes(site: LocalHub) -> None:
    site.cuts = [12_000_000]
    path = zoo.fetch("ced_tiny")
    assert path.read_bytes() == site.files["mispeech/ced-tiny", "model.safetensors"]
    assert len(site.downloads()) == 2
    assert site.downloads()[1].endswith("bytes=10485760-")  # the client keeps whole blocks


def test_offline_uses_what_is_cached(site: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CED_OFFLINE", "1")
    with pytest.raises(DownloadError, match=r"ced_tiny is not cached: .*CED_OFFLINE is set.*-m esc10"):
        zoo.fetch("ced_tiny")
    monkeypatch.delenv("CED_OFFLINE")
    path = zoo.fetch("ced_tiny")
    monkeypatch.setenv("CED_OFFLINE", "1")
    assert zoo.fetch("ced_tiny") == path


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (401, {}, "401, not authorised.*HF_TOKEN"),
        (404, {"X-Error-Code": "RepoNotFound"}, "404"),
        (404, {"X-Error-Code": "EntryNotFound"}, "404"),
        (429, {}, "429, too many requests"),
    ],
)
def test_an_error_of_the_hub_is_one_line(
    site: LocalHub, status: int, headers: dict[str, str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    site.statuses = [(status, headers)] * 20
    with pytest.raises(DownloadError, match=rf"cannot download from {site.url}, mispeech/ced-tiny.*{reason}") as caught:
        zoo.fetch("ced_tiny")
    assert "\n" not in str(caught.value)
    assert "Zenodo cannot be reached" in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "no address", "http://[", "ftp://127.0.0.1"])
def test_an_endpoint_that_cannot_be_used_is_one_line(
    site: LocalHub, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(DownloadError, match="cannot download from") as caught:
        zoo.fetch("ced_tiny")
    assert "\n" not in str(caught.value)


def test_a_blank_endpoint_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def refuse(*_: object, endpoint: str | None, **__: object) -> str:
        seen.append(endpoint)
        return "file"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    for given in ("", "  ", "https://mirror.example/"):
        monkeypatch.setenv("HF_ENDPOINT", given)
        download.hub_file("a/b", "c", "d")
    assert seen == [None, None, "https://mirror.example"]


def test_a_changed_file_is_refused_and_removed(site: LocalHub, tmp_path: Path) -> None:
    site.files["mispeech/ced-tiny", "model.safetensors"] = hub_weights(random_network("ced_tiny", seed=1))
    (tmp_path / "cache").mkdir()
    torch.save({}, tmp_path / "cache" / "audiotransformer_tiny_mAP_4814.pt")  # must not stand in for it
    with pytest.raises(
        ChecksumError, match=r"mispeech/ced-tiny.* sha256 is [0-9a-f]{64}, not the published .*; removed"
    ):
        zoo.fetch("ced_tiny")
    assert cached_files(tmp_path) == []


def test_a_file_damaged_in_the_cache_is_downloaded_again(
    site: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = zoo.fetch("ced_tiny")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content)
    entry = zoo.MODELS["ced_tiny"]
    ((source, cached),) = zoo.cached(entry).items()
    assert zoo.damage(source, cached) is not None
    again = zoo.fetch("ced_tiny")
    assert "damaged; downloading it again" in caplog.text
    assert again.read_bytes() == site.files["mispeech/ced-tiny", "model.safetensors"]
    again.resolve().write_bytes(content)
    monkeypatch.setenv("CED_OFFLINE", "1")
    with pytest.raises(ChecksumError, match="removed"):
        zoo.fetch("ced_tiny")
    assert cached_files(tmp_path) == []


def test_only_content_of_the_repository_is_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"of the user")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").symlink_to(tmp_path / "mine")
    download.remove_hub_file(tmp_path / "hub" / "model.safetensors")
    assert list((tmp_path / "hub").iterdir()) == []
    assert (tmp_path / "mine").exists()


def test_two_processes_download_once(site: LocalHub, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from ced.model import zoo\n"
        "entry = zoo.MODELS['ced_tiny']\n"
        "zoo.MODELS = {'ced_tiny': replace(entry, hub=replace(entry.hub, sha256=sys.argv[1]))}\n"
        "print(zoo.fetch('ced_tiny'))\n"
    )
    source = zoo.MODELS["ced_tiny"].hub
    assert source is not None
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "shared")}
    command = [sys.executable, "-c", program, source.sha256]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1]
    assert len(site.downloads()) == 1


def test_zenodo_is_the_second_source(site: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.statuses = [(404, {"X-Error-Code": "RepoNotFound"})] * 20
    asked = []

    def download_file(url: str, path: Path, **_: object) -> None:
        asked.append(url)
        if "8275319" in url:
            raise download.NotFoundError("404")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({}, path)

    monkeypatch.setattr(download, "download", download_file)
    assert zoo.fetch("ced_small") == tmp_path / "cache" / "audiotransformer_small_mAP_4958.pt"
    assert [url.split("/")[4] for url in asked] == ["8275319", "8275347"]  # the record that has it, then the other
