"""The commands `ced export` and `ced models`."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner, Result

from ced.cli import app
from ced.model import loading, zoo
from ced.model.config import ModelConfig
from ced.model.vit import CED
from ced.sound.labels import ClassTable
from tests.local_hub import LocalHub, published, random_network, running


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a student and labelled clips, an empty cache, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CED_OFFLINE", "1")
    monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=64, num_heads=1, depth=1, outputdim=2)
    loading.save(tmp_path / "student.safetensors", CED(config, ClassTable(("low", "high"))))
    (tmp_path / "clips").mkdir()
    lines = ["filename\tlabel"]
    for number in range(4):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 900 * number) / 16_000 * np.arange(8_000))
        soundfile.write(tmp_path / "clips" / f"{number}.wav", tone, 16_000)
        lines.append(f"{number}.wav\t{number // 2}")
    (tmp_path / "clips" / "meta.tsv").write_text("\n".join(lines) + "\n")


def ced(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def graphs() -> list[str]:
    return sorted(name for name in os.listdir() if name.endswith((".onnx", ".csv")))


def test_export_writes_a_graph_from_waveform_to_probabilities() -> None:
    done = ced("export", "-m", "student.safetensors")
    assert (done.exit_code, graphs()) == (0, ["student.onnx"])
    assert re.fullmatch(r"student\.onnx: probabilities differ from the network's by \de-\d\d at most\n", done.stdout)


def test_export_writes_graphs_of_features_and_int8() -> None:
    done = ced("export", "-m", "student.safetensors", "-o", "new/a.onnx", "--input", "feats", "--int8")
    assert done.exit_code == 0
    assert sorted(os.listdir("new")) == ["a.int8.onnx", "a.onnx", "class_labels_indices.csv"]
    heading, labels, int8 = done.stdout.splitlines()
    assert heading.startswith("new/a.onnx: probabilities differ")
    assert labels == "new/class_labels_indices.csv"
    assert re.fullmatch(r"new/a\.int8\.onnx: probabilities change by [\d.e-]+ at most on noise; --check .*", int8)


def test_export_compares_int8_on_labelled_clips() -> None:
    done = ced("export", "-m", "student.safetensors", "--int8", "--check", "clips", "--bound", "100")
    assert (done.exit_code, graphs()) == (0, ["student.int8.onnx", "student.onnx"])
    assert re.search(
        r"student\.int8\.onnx: mAP [\d.]+ -> [\d.]+ \([+-][\d.]+ points\), accuracy .* \(4 clips\)\n", done.stdout
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--check", "clips"], 2, "it needs --int8"),
        (["--input", "mel"], 2, "'mel' is not one of"),
        (["--int8", "--check", "nowhere"], 1, "nowhere"),
        (["--int8", "--bound", "-1"], 1, "bound is -1.0; it must be 0 or more"),
    ],
)
def test_wrong_options_are_one_line_errors(words: list[str], code: int, message: str) -> None:
    done = ced("export", "-m", "student.safetensors", *words)
    assert done.exit_code == code
    assert message in " ".join(done.stderr.split())


@pytest.fixture
def published_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with `ced_tiny` of random weights, and empty caches."""
    monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("CED_OFFLINE", raising=False)
    with running(LocalHub()) as hub:
        monkeypatch.setattr(zoo, "MODELS", published(hub, {"ced_tiny": random_network("ced_tiny")}))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_models_lists_sources_licences_and_cached_files(published_tiny: LocalHub, tmp_path: Path) -> None:
    def rows() -> list[list[str]]:
        return [re.split("  +", line.strip()) for line in ced("models").stdout.splitlines()]

    assert rows()[1:3] == [
        ["ced_tiny", "5.5 M", "48.1", "22 MB", "mispeech/ced-tiny", "Apache-2.0", "no", rows()[1][-1]],
        ["Zenodo 8275347", "CC BY 4.0", "no"],
    ]
    assert ced("models", "--verify").stdout == "no model is cached\n"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "audiotransformer_mini_mAP_4896.pt").write_bytes(b"<html>")
    assert ced("export", "-m", "ced_tiny").exit_code == 0
    found = {row[0]: row[6] for row in rows() if len(row) == 8}
    assert (found["ced_tiny"], found["ced_mini"]) == ("yes", "no")
    done = ced("models", "--verify")
    assert done.exit_code == 1
    assert re.fullmatch(r"ced_tiny: .*model\.safetensors: sha256 correct\n", done.stdout)
    assert re.search(r"ced_mini: .*4896\.pt is damaged: .* delete it", " ".join(done.stderr.split()))


def test_the_model_in_the_package_is_listed_with_its_card() -> None:
    *_, line = ced("models").stdout.splitlines()
    name, card = line.split()[0], Path(line.split()[-1])
    assert name == "esc10"
    assert card.read_text(encoding="utf-8").startswith("# esc10")
