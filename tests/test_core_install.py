"""The core install: the wheel in a fresh environment, without torch."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import ced
from ced.model import loading
from ced.model.loading import TorchScorer
from ced.model.vit import CED
from ced.sound.labels import audioset
from tests.local_hub import LocalHub, published, random_network, running

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
HEAVY = ("torch", "h5py", "pyarrow", "matplotlib")


@pytest.fixture(scope="module", autouse=True)
def _installed_package_only() -> Iterator[None]:
    """Let programs of the fresh environment find nothing of the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        yield


def pip(python: Path | str, *words: str | Path) -> None:
    subprocess.run([python, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, as a release is made."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ced", source / "ced", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("ced_audio-*.tar.gz")
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    (built,) = folder.glob("ced_audio-*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with only the core of the wheel."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    pip(folder / "env/bin/python", "install", "-c", ROOT / "constraints.txt", wheel)
    return folder / "env/bin"


def test_the_wheel_contains_the_whole_package(wheel: Path, fresh: Path, tmp_path: Path) -> None:
    files = {path for path in (ROOT / "ced").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert held == {str(path.relative_to(ROOT)) for path in files}
    assert f"Version: {ced.__version__}\n".encode() in metadata
    done = subprocess.run([fresh / "ced", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"ced {ced.__version__}\n"
    where = "import ced; print(ced.__file__)"
    found = subprocess.run([fresh / "python", "-c", where], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(found.stdout).is_relative_to(fresh.parent)


def test_the_core_tags_without_torch(fresh: Path, small_network: CED, graph: Path, tmp_path: Path) -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", wave, 16_000, subtype="PCM_24")
    decoded, _ = soundfile.read(tmp_path / "a.flac", dtype="float32")
    with torch.inference_mode():
        probs = small_network.probs(torch.from_numpy(decoded)[None])[0]

    missing = "import sys, importlib.util as u; sys.exit(any(u.find_spec(name) for name in sys.argv[1:]))"
    subprocess.run([fresh / "python", "-c", missing, *HEAVY], check=True)
    words = ["tag", "-m", str(graph), "-k", "1", str(tmp_path / "a.flac")]
    done = subprocess.run([fresh / "ced", *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    best = int(probs.argmax())
    heading, line, blank = done.stdout.split("\n")[:3]
    assert heading == f"===== {tmp_path / 'a.flac'} ====="
    assert line.startswith(f"[0.0s]-[1.0s] Topk-1 {small_network.labels.names[best]} 0.")
    assert float(line.split()[-1]) == pytest.approx(float(probs[best]), abs=2e-4)
    assert blank == ""


def test_the_model_in_the_package_works_offline(fresh: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "CED_CACHE": str(tmp_path / "cache"), "CED_OFFLINE": "1"}
    sound = ROOT / "resources" / "rooster.ogg"
    words = [str(fresh / "ced"), "tag", "-m", "esc10", "-k", "10", str(sound)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"===== {sound} =====\n[0.0s]-[6.0s] Topk-1 ")
    assert done.stdout.count("Topk-") == 10
    assert not (tmp_path / "cache").exists()

    find = "from ced.model import zoo; print(*zoo.BOXED['esc10'].parent.iterdir())"
    found = subprocess.run([fresh / "python", "-c", find], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert {Path(path).name for path in found.stdout.split()} >= {"esc10.onnx", "esc10.md", "esc10_credits.tsv"}


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["train", "a.yaml"], "ced-audio[train]"),
        (["export", "-m", "a.pt"], "ced-audio[train]"),
        (["tag", "-m", "a.pt", "a.flac"], "ced-audio[train]"),
        (["tag", "-m", "small.onnx", "-f", "parquet", "-o", "out", "a.flac"], "ced-audio[parquet]"),
        (["tag", "-m", "small.onnx", "a.m4a"], "ced-audio[media]"),
        (["serve", "-m", "small.onnx", "--port", "0"], "ced-audio[serve]"),
        (["app", "-m", "small.onnx", "--port", "0"], "ced-audio[serve]"),
        (["live", "-m", "small.onnx"], "ced-audio[live]"),
        (["live", "-m", "small.onnx", "http://127.0.0.1:1/"], "ced-audio[media]"),
    ],
)
def test_errors_name_the_extra_that_is_missing(
    fresh: Path, graph: Path, tmp_path: Path, words: list[str], extra: str
) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    shutil.copy(graph, tmp_path)
    torch.save({}, tmp_path / "a.pt")
    for name in ("a.m4a", "a.flac"):
        (tmp_path / name).write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    done = subprocess.run([fresh / "ced", *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert f"pip install '{extra}'" in line


# Runs `ced` with the checksums of random weights in the place of the published ones.
WITH_CHECKSUMS = """
import json, sys
from dataclasses import replace
from ced.model import zoo
checksums = json.loads(sys.argv.pop(1))
for name, sha256 in checksums.items():
    zoo.MODELS[name] = replace(zoo.MODELS[name], hub=replace(zoo.MODELS[name].hub, sha256=sha256))
from ced.cli import main
main()
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A clip of 12 s, longer than one forward pass, and its samples."""
    path = tmp_path_factory.mktemp("clip") / "noise.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0.0, 0.1, 12 * 16_000), 16_000, subtype="PCM_16")
    return path, torch.from_numpy(soundfile.read(path, dtype="float32")[0])


@pytest.mark.parametrize("name", ["ced_tiny", "ced_mini", "ced_small", "ced_base"])
def test_published_names_have_the_scores_of_the_network(
    fresh: Path, clip: tuple[Path, torch.Tensor], tmp_path: Path, name: str
) -> None:
    path, wave = clip
    network = random_network(name)
    with torch.inference_mode():
        ten, thirty = network.probs(wave[None, :160_000])[0], network.probs(wave[None])[0]
        scorer, waves = TorchScorer(network), wave[None].numpy()
        columns, embedding = scorer.columns(waves)[0], scorer.embed(waves[:, :160_000])
    with running(LocalHub()) as hub:
        models = published(hub, {name: network})
        checksums = {name: models[name].hub.sha256}  # type: ignore[union-attr]
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "CED_CACHE": str(tmp_path / "cache"),
            "CED_OFFLINE": "",
        }

        def ced(*words: str) -> str:
            command: list[str | Path] = [fresh / "python", "-c", WITH_CHECKSUMS, json.dumps(checksums), *words]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=300
            )
            assert done.returncode == 0, done.stderr
            return str(done.stdout)

        def scores(*words: str) -> list[dict[str, float]]:
            (line,) = ced("tag", "-m", name, "-f", "jsonl", "-k", "527", *words, str(path)).splitlines()
            return [{tag["label"]: tag["prob"] for tag in piece["tags"]} for piece in json.loads(line)["pieces"]]

        first = scores()[0]
        assert set(first) == set(audioset().names)
        assert [first[label] for label in audioset().names] == pytest.approx(ten.tolist(), abs=1e-5)
        (whole,) = scores("-c", "30")
        assert [whole[label] for label in audioset().names] == pytest.approx(thirty.tolist(), abs=1e-5)
        found = scores("-c", "30", "--columns")
        assert len(found) == len(columns) == 74
        for row, expected in zip(found[::25], columns[::25], strict=True):
            assert [row[label] for label in audioset().names] == pytest.approx(expected.tolist(), abs=1e-5)
        rounded = scores("-c", "30", "--precision", "int8")[0]
        changes = np.abs(np.array([rounded[label] - whole[label] for label in audioset().names]))
        assert 0 < changes.max() < 0.05
        ced("embed", "-m", name, "--windows", "-o", "vectors.npy", str(path))
        np.testing.assert_allclose(np.load(tmp_path / "vectors.npy")[0], embedding[0], atol=1e-4)
        assert len(hub.downloads()) == 1


def test_tagging_imports_only_what_it_needs(fresh: Path, small_network: CED, tmp_path: Path) -> None:
    loading.save(tmp_path / "a.safetensors", small_network)
    soundfile.write(tmp_path / "a.flac", np.zeros(16_000), 16_000)
    environment = {**os.environ, "CED_CACHE": str(tmp_path / "cache")}
    command: list[str | Path] = [
        fresh / "python",
        "-X",
        "importtime",
        "-m",
        "ced",
        "tag",
        "-m",
        "a.safetensors",
        "a.flac",
    ]
    for cached in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
        assert "onnxruntime" in imported
        heavy = {"torch", "transformers", "huggingface_hub", "onnx", "safetensors"} & imported
        assert heavy == (set() if cached else {"onnx", "safetensors"})
