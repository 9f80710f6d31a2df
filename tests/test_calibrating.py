"""`ced calibrate` and what is done with its file, as a user does it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ced.model import loading
from ced.model.config import ModelConfig
from ced.model.vit import CED
from ced.sound.labels import ClassTable

ROOT = Path(__file__).parents[1]
CLASSES = ClassTable(("bark", "bell", "rain"))


def ced(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ced", *words]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "CED_OFFLINE": "1", "CED_CACHE": str(folder / "cache")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small network and six clips, one of which is no sound."""
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=32, num_heads=2, depth=1, outputdim=3, target_length=112)
    loading.save(tmp_path / "small.safetensors", CED(config, CLASSES))
    generator = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for number in range(5):
        noise = generator.normal(size=8_000 * (number + 1)).astype(np.float32) * 10.0 ** -(number + 1)
        soundfile.write(tmp_path / "audio" / f"{number}.wav", noise, 16_000)
    (tmp_path / "audio" / "5.wav").write_bytes(b"no sound")
    rows = "".join(f"{number}.wav\t{number % 2}\n" for number in range(6))
    (tmp_path / "meta.tsv").write_text(f"filename\tlabel\n{rows}", encoding="utf-8")
    return tmp_path


def test_thresholds_are_fitted_written_and_used(folder: Path) -> None:
    done = ced(folder, "calibrate", ".", "-m", "small.safetensors", "-o", "mine.tsv", "--window", "1", "-j", "2")
    assert done.returncode == 1, done.stderr  # for the clip that is no sound
    assert "warning: skipped: " in done.stderr
    assert "5.wav" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "mine.tsv: thresholds fitted to 5 clips with 2 classes"
    assert lines[1].startswith("F1, mean over these classes")
    (common,) = lines[2:]
    assert common.endswith("common to all: rain")
    rows = (folder / "mine.tsv").read_text(encoding="utf-8").splitlines()
    assert rows[1] == "index\tname\tthreshold\tprecision\trecall\tf1\tpositives"
    assert [row.split("\t")[1] for row in rows[2:]] == ["bark", "bell", "rain"]
    assert [row.split("\t")[-1] for row in rows[2:]] == ["3", "2", "0"]
    tagged = ced(folder, "tag", "audio/0.wav", "-m", "small.safetensors", "--threshold", "mine.tsv")
    assert tagged.returncode == 0, tagged.stderr
    assert tagged.stdout.startswith("===== audio/0.wav =====")


def test_a_table_of_other_classes_is_one_line(folder: Path) -> None:
    (folder / "meta.tsv").write_text("filename\tlabel\n0.wav\t3\n", encoding="utf-8")
    done = ced(folder, "calibrate", ".", "-m", "small.safetensors")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ced: error: table meta.tsv, row 1: label '3' is not one of 0 to 2"
    assert not (folder / "thresholds.tsv").exists()
