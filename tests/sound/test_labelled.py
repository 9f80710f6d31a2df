import os
from pathlib import Path

import pytest

from ced.errors import TableError
from ced.sound.labelled import LabelledClip, read_labelled
from ced.sound.labels import ClassTable, numbered

CLASSES = ClassTable(("dog", "cat", "rain"))


def table(folder: Path, text: str, files: tuple[str, ...] = ()) -> Path:
    """Write a table and empty files beside it."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    path = folder / "meta.tsv"
    path.write_text(text, encoding="utf-8")
    return path


def test_several_labels_a_clip(tmp_path: Path) -> None:
    path = table(tmp_path, "filename\tlabels\na.wav\t0;2\nb.wav\t\nsub/c.wav\t1\n", ("a.wav", "b.wav", "sub/c.wav"))
    assert read_labelled(path, CLASSES) == [
        LabelledClip(tmp_path / "a.wav", (0, 2)),
        LabelledClip(tmp_path / "b.wav", ()),
        LabelledClip(tmp_path / "sub" / "c.wav", (1,)),
    ]


def test_one_label_a_clip_in_a_folder(tmp_path: Path) -> None:
    table(tmp_path, "filename\tfold\tlabel\tname\na.ogg\t1\t2\train\n", ("audio/a.ogg",))
    assert read_labelled(tmp_path, CLASSES) == [LabelledClip(tmp_path / "audio" / "a.ogg", (2,))]


def test_files_are_searched_for_in_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.wav").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    absolute = tmp_path / "d.wav"
    absolute.touch()
    home = tmp_path / "home"
    path = table(
        home,
        f"filename\tlabels\na.wav\t0\nb.wav\t0\nc.wav\t0\n{absolute}\t0\n",
        ("a.wav", "audio/a.wav", "audio/b.wav"),
    )
    found = [clip.path for clip in read_labelled(path, CLASSES)]
    assert found == [home / "a.wav", home / "audio" / "b.wav", Path("c.wav"), absolute]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("filename\tlabels\na.wav\t0\nb.wav\t1;3\n", "row 2: label '3' is not one of 0 to 2"),
        ("filename\tlabel\na.wav\tdog\n", "row 1: label 'dog' is not one of 0 to 2"),
        ("filename\tname\na.wav\tdog\n", "has no column 'labels'; its columns are filename, name"),
        ("file\tlabels\na.wav\t0\n", "has no column 'filename'"),
        (
            "filename\tlabels\na.wav\t0\ny.wav\t0\nz.wav\t1\n",
            "2 of 3 files are missing, the first is 'y.wav'",
        ),
    ],
)
def test_invalid_tables(tmp_path: Path, text: str, said: str) -> None:
    path = table(tmp_path, text, ("a.wav", "b.wav"))
    with pytest.raises(TableError) as caught:
        read_labelled(path, CLASSES)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"cannot read table .*meta\.tsv"):
        read_labelled(tmp_path, CLASSES)


@pytest.mark.skipif("CED_ESC10" not in os.environ, reason="CED_ESC10 names no copy of ESC-10")
def test_esc10() -> None:
    clips = read_labelled(os.environ["CED_ESC10"], numbered(10))
    assert len(clips) == 400
    assert [sum(clip.labels == (label,) for clip in clips) for label in range(10)] == [40] * 10


def test_labels_of_another_class_table_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path, "filename\tlabel\tname\na.wav\t1\tCat\nb.wav\t0\tSpeech\n", ("a.wav", "b.wav"))
    with pytest.raises(TableError, match=r"row 2: label 0 is named 'Speech', but class 0 of the model is 'dog'"):
        read_labelled(path, CLASSES)
