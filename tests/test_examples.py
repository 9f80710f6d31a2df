"""The scripts in examples/, run offline with the commands of their page."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from ced import Tagger

ROOT = Path(__file__).parents[1]


def run(cache: Path, script: str, *words: str | Path) -> str:
    """Run an example in the root of the repository, and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CED_CACHE": str(cache), "CED_OFFLINE": "1"}
    command = [sys.executable, ROOT / "examples" / script, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_folder_becomes_a_table_and_a_picture(tmp_path: Path) -> None:
    printed = run(tmp_path, "tag_folder.py", "resources", "--out", tmp_path)
    sounds = {str(path.relative_to(ROOT)) for path in (ROOT / "resources").glob("*.ogg")}
    with (tmp_path / "tags.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == sounds
    assert all(0 <= float(row["prob"]) <= 1 for row in rows)
    for sound in sounds:
        best = max((row for row in rows if row["file"] == sound), key=lambda row: float(row["prob"]))
        (line,) = (line for line in printed.splitlines() if line.split() and line.split()[0] == sound)
        assert line.split()[1:-1] == best["label"].split()
    assert (tmp_path / "tags.png").read_bytes().startswith(b"\x89PNG")


def test_a_probe_classifies_generated_sounds(tmp_path: Path) -> None:
    printed = run(tmp_path, "train_probe.py")
    accuracy = re.match(r"accuracy (\d\.\d\d) ", printed)
    assert accuracy
    assert float(accuracy[1]) > 0.9  # chance is a third
    found = re.findall(r"^(\w+): tagged as (\w+)$", printed, re.M)
    assert len(found) == 3
    assert all(said == given for given, said in found)


@pytest.mark.slow
def test_a_student_learns_from_your_own_teacher(tmp_path: Path) -> None:
    printed = run(tmp_path / "cache", "distil_from_your_teacher.py", "--out", tmp_path / "out")
    first = re.findall(r"^===== (\w+)\.wav =====\n\S+ Topk-1 (\w+) ([\d.]+)$", printed, re.M)
    assert [(sound, label) for sound, label, _ in first] == [("low", "low"), ("high", "high")]
    assert all(float(score) > 0.7 for *_, score in first)


def test_spark_tags_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    for name in ("rooster.ogg", "robin.ogg"):
        shutil.copy(ROOT / "resources" / name, tmp_path)
    (tmp_path / "damaged.wav").write_bytes(b"RIFF")
    printed = run(tmp_path, "spark_tag.py", tmp_path, "--out", tmp_path / "tags")
    table = pandas.read_parquet(tmp_path / "tags")
    (failed,) = table[table["error"].notna()].to_dict("records")
    assert failed["file"] == str(tmp_path / "damaged.wav")
    assert "damaged.wav" in failed["error"]
    good = table[table["error"].isna()]
    with Tagger("esc10") as tagger:
        records = [tagger.tag(tmp_path / name) for name in ("robin.ogg", "rooster.ogg")]
    expected = [(record.file, tag.label, tag.prob) for record in records for piece in record for tag in piece.tags]
    found = good.sort_values(["file", "start", "prob"], ascending=[True, True, False])
    assert list(zip(found["file"], found["label"], strict=True)) == [(file, label) for file, label, _ in expected]
    assert found["prob"].tolist() == pytest.approx([prob for *_, prob in expected], abs=1e-6)
    assert printed.splitlines()[-1] == f"3 files, 1 failed, {len(expected)} tags"


def test_the_page_lists_every_script() -> None:
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for script in (ROOT / "examples").glob("*.py"):
        assert f"[{script.name}]({script.name})" in page
        assert f"python examples/{script.name}" in page
