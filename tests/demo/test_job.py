import os
from pathlib import Path

import pytest

from ced.demo.job import DemoReport, DemoSettings, generated_sounds, run_demo, split
from ced.errors import TableError
from ced.sound.tables import read_table, write_table

SMALLEST = {"embed_dim": 16, "num_heads": 1, "depth": 1}
SETTINGS = DemoSettings(
    teachers={"teacher_a": SMALLEST, "teacher_b": {**SMALLEST, "depth": 2}},
    student=SMALLEST,
    teacher_epochs=2,
    student_epochs=2,
    stored_epochs=3,
    lr=1e-3,
    batch_size=8,
    clips_per_class=5,
    clip_seconds=0.5,
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoReport, list[str]]:
    announced: list[str] = []
    return run_demo(tmp_path_factory.mktemp("unbroken"), settings=SETTINGS, announce=announced.append), announced


def test_a_run_goes_from_sounds_to_tags(unbroken: tuple[DemoReport, list[str]]) -> None:
    report, announced = unbroken
    assert list(report.scores) == ["teacher_a", "teacher_b", "ensemble", "student"]
    for found in report.scores.values():
        assert 0 < found.map <= 1
        assert (found.clips, len(found.labels), found.missing) == (8, 8, ())
    assert report.parameters["ensemble"] == report.parameters["teacher_a"] + report.parameters["teacher_b"]
    assert report.views == 3 * 32  # epochs, clips outside the held-out fold
    assert report.bytes_per_view == 5 * (2 + 2) + 4
    assert all(path.exists() for path in report.written.values())
    assert len(report.tagged) == 4
    assert all("-4.wav" in name and len(tags.tags) == 3 for name, tags in report.tagged.items())  # of fold 5
    assert len(announced) == len(report.seconds) == 8


def test_the_report_is_a_table(unbroken: tuple[DemoReport, list[str]]) -> None:
    report, _ = unbroken
    lines = "\n".join(report.lines()).splitlines()
    (row,) = (line.split() for line in lines if line.startswith("ensemble"))
    assert row[1] == f"{report.scores['ensemble'].map:.4f}"
    assert "On 8 held-out clips of 8 classes:" in lines
    assert "views stored  96 of 24 bytes" in lines
    for path in report.written.values():
        assert any(line.endswith(str(path)) for line in lines)


def test_an_interrupted_run_resumes_to_the_same_results(unbroken: tuple[DemoReport, list[str]], tmp_path: Path) -> None:
    class PowerCutError(Exception):
        pass

    announced: list[str] = []

    def cut(task: str, done: int, total: int, _: str = "") -> None:
        if "teacher_b" in announced[-1] and task.startswith("epoch 2"):
            raise PowerCutError

    with pytest.raises(PowerCutError):
        run_demo(tmp_path, settings=SETTINGS, announce=announced.append, progress=cut)
    report = run_demo(tmp_path, settings=SETTINGS)
    experiments = tmp_path / "generated_fold5" / "experiments"
    assert sorted(path.parent.name for path in experiments.glob("*/*/")) == ["student", "teacher_a", "teacher_b"]
    whole, _ = unbroken
    for name, found in whole.scores.items():
        assert report.scores[name].map == found.map

    before = {path: path.stat().st_mtime_ns for path in experiments.rglob("*.safetensors")}
    again = run_demo(tmp_path, settings=SETTINGS)  # everything is finished
    assert again.written == report.written
    assert {path: path.stat().st_mtime_ns for path in experiments.rglob("*.safetensors")} == before


def test_recordings_are_split_by_fold(tmp_path: Path) -> None:
    meta = {
        "filename": ["a.ogg", "b.ogg", "c.ogg"],
        "fold": ["1", "2", "1"],
        "label": ["40", "40", "7"],
        "name": ["Helicopter", "Helicopter", "Rooster"],
    }
    write_table(tmp_path / "meta.tsv", meta)
    train, test, classes = split(tmp_path, 2, tmp_path / "lists")
    assert read_table(train).columns == {
        "filename": [str(tmp_path / "a.ogg"), str(tmp_path / "c.ogg")],
        "labels": ["1", "0"],
    }
    assert read_table(test).columns == {"filename": [str(tmp_path / "b.ogg")], "labels": ["1"]}
    assert read_table(classes).columns == {"index": ["0", "1"], "name": ["Rooster", "Helicopter"]}
    with pytest.raises(TableError, match=r"fold 3 .* its folds are 1, 2"):
        split(tmp_path, 3, tmp_path / "lists")


@pytest.mark.parametrize("label", ["", "dog", "1.5"])
def test_labels_of_recordings_must_be_numbers(label: str, tmp_path: Path) -> None:
    write_table(tmp_path / "meta.tsv", {"filename": ["a"], "fold": ["1"], "label": [label], "name": ["Dog"]})
    with pytest.raises(TableError, match="label"):
        split(tmp_path, 1, tmp_path / "lists")


def test_sounds_are_generated_once(tmp_path: Path) -> None:
    folder = generated_sounds(tmp_path / "sounds", SETTINGS)
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert generated_sounds(folder, SETTINGS) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == made


@pytest.mark.skipif("CED_ESC10" not in os.environ, reason="CED_ESC10 names no copy of ESC-10")
def test_esc10_is_split_by_fold(tmp_path: Path) -> None:
    train, test, classes = split(Path(os.environ["CED_ESC10"]), 5, tmp_path)
    assert (len(read_table(train)), len(read_table(test)), len(read_table(classes))) == (320, 80, 10)
    assert all(Path(name).is_file() for name in read_table(test).column("filename"))
