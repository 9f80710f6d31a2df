from pathlib import Path

import pytest

from ced.errors import TableError
from ced.sound.labels import ClassTable, audioset, default_classes, numbered, read_classes


def test_audioset() -> None:
    classes = audioset()
    assert len(classes) == 527
    assert classes.names[:2] == ("Speech", "Male speech, man speaking")
    assert classes.names[137] == "Music"
    assert classes.names[526] == "Field recording"
    assert classes.mids is not None
    assert (classes.mids[0], classes.mids[137], classes.mids[526]) == ("/m/09x0r", "/m/04rlf", "/m/07hvw1")
    assert audioset() is classes


def test_numbered() -> None:
    assert numbered(3) == ClassTable(("class 0", "class 1", "class 2"))
    assert default_classes(3) == numbered(3)
    assert default_classes(527) == audioset()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.tsv", "# mine\nindex\tmid\tname\n0\t/m/1\tdog, small\n\n1\t/m/2\tcat\n"),
        ("classes.txt", "index\tname\tmid\r\n0\tdog, small\t/m/1\r\n1\tcat\t/m/2\r\n"),
        ("class_labels_indices.csv", 'index,mid,display_name\n0,/m/1,"dog, small"\n1,/m/2,"cat"\n'),
        ("bom.CSV", '\ufeffindex,mid,display_name\n0,/m/1,"dog, small"\n1,/m/2,cat\n'),
    ],
)
def test_read(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    assert read_classes(path) == ClassTable(("dog, small", "cat"), ("/m/1", "/m/2"))


def test_read_without_mids(tmp_path: Path) -> None:
    path = tmp_path / "classes.tsv"
    path.write_text("index\tname\n0\tHund\n1\tKätzchen\n", encoding="utf-8")
    assert read_classes(path) == ClassTable(("Hund", "Kätzchen"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has columns []; it needs index and name"),
        ("index\tname\n", "it needs index and name"),
        ("index\tname\n0\n", "row 1 has another number of fields"),
        ("index\tname\n0\tdog\tbark\n", "row 1 has another number of fields"),
        ("number\tname\n0\tdog\n", "has columns ['number', 'name']"),
        ("index\tmid\n0\t/m/1\n", "has columns ['index', 'mid']"),
        ("index\tname\n1\tdog\n", "row 1 has index '1'; expected 0"),
        ("index\tname\n0\tdog\n2\tcat\n", "row 2 has index '2'; expected 1"),
        ("index\tname\n0\tdog\n1\tdog\n", "class name 'dog' stands more than once"),
        ("index\tname\tmid\n0\tdog\t/m/1\n1\tcat\t/m/1\n", "class mid '/m/1' stands more than once"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "classes.tsv"
    path.write_text(text)
    with pytest.raises(TableError) as caught:
        read_classes(path)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_files_that_are_no_tables(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "classes.tsv"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00index")
    with pytest.raises(TableError, match=r"cannot read class table .*classes\.tsv"):
        read_classes(path)


def test_classes_must_be_named_once() -> None:
    with pytest.raises(TableError, match="at least one class"):
        ClassTable(())
    with pytest.raises(TableError, match="2 names but 1 mids"):
        ClassTable(("dog", "cat"), ("/m/1",))
