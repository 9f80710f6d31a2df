import os
from pathlib import Path

import pytest

from ced.errors import TableError
from ced.sound.labels import ClassTable, numbered, read_classes
from ced.sound.tables import (
    LabelledClip,
    LabelsReport,
    Table,
    multi_hot,
    parse_labels,
    read_batches,
    read_labelled,
    read_table,
    segments_to_labels,
    write_table,
)

CLASSES = ClassTable(("dog", "cat", "rain"), ("/m/dog", "/m/cat", "/t/rain"))


def refused(path: Path, text: str, delimiter: str = "\t", required: tuple[str, ...] = ()) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TableError) as caught:
        read_table(path, delimiter, required)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message or delimiter != "\t"
    return message


def test_quotes_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('\ufefffilename\tlabels\r\na b.wav\t1;2\r\n\r\n"q ""x"".wav"\t\r\n', encoding="utf-8", newline="")
    table = read_table(path, required=("labels",))
    assert table == Table({"filename": ["a b.wav", 'q "x".wav'], "labels": ["1;2", ""]}, path)
    assert len(table) == 2
    assert table.column("filename") == ["a b.wav", 'q "x".wav']


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_of_windows_programs(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes("filename\tname\r\nKäfer 虫.wav\tx\r\n".encode(encoding))
    assert read_table(path).columns == {"filename": ["Käfer 虫.wav"], "name": ["x"]}
    path.write_bytes("index\tname\r\n0\tKäfer\r\n".encode(encoding))
    assert read_classes(path).names == ("Käfer",)


def test_any_cell_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    cells = ["plain", "a\rb", "a\nb", "a\r\nb", "a\tb", 'a"b', "", " a ", "\x1b[0m", "\udce9.wav"]
    write_table(tmp_path / "a.tsv", {"x": cells, "y": cells[::-1]})
    assert read_table(tmp_path / "a.tsv").columns == {"x": cells, "y": cells[::-1]}


def test_large_tables_come_in_batches_and_errors_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    names = [f"{number}.wav" for number in range(40_000)]
    write_table(path, {"filename": names, "x": names[::-1]})
    batches = list(read_batches(path))
    assert len(batches) > 1
    assert [name for batch in batches for name in batch.column("filename")] == names
    assert read_table(path).columns == {"filename": names, "x": names[::-1]}
    with path.open("a") as file:
        file.write("\nlast\n")
    with pytest.raises(TableError, match="line 40003: 1 fields; the header has 2"):
        list(read_batches(path))


def test_a_damaged_utf16_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"\xff\xfe" + "a\tb\r\n".encode("utf-16-le") + b"\x00")
    with pytest.raises(TableError, match=r"cannot read table .*a\.tsv"):
        read_table(tmp_path / "a.tsv")


def test_read_with_another_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('filename,name\nä.wav,"one, two"\n', encoding="utf-8")
    assert read_table(path, ",").columns == {"filename": ["ä.wav"], "name": ["one, two"]}


def test_tables_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    assert "is empty" in refused(path, "")
    assert "is empty" in refused(path, "\n\n")
    assert "has a header (filename, labels) but no rows" in refused(path, "filename\tlabels\n")
    assert "no column 'labels'; its columns are filename, x" in refused(path, "filename\tx\na\t1\n", "\t", ("labels",))
    assert "no column 'labels'; its columns are file" in refused(path, "file\n", "\t", ("labels",))
    assert "more than one column 'x'" in refused(path, "x\tx\na\tb\n")
    assert "line 3: 1 fields; the header has 2" in refused(path, "x\ty\na\tb\nc\n")
    assert "line 4: 3 fields; the header has 2" in refused(path, "x\ty\na\tb\n\nc\td\te\n")
    broken = 'x\ty\na\tb\n"c\td\ne\tf\n'  # a quote that never ends must not swallow rows
    assert "line 3: unexpected end of data; is a quote not closed there?" in refused(path, broken)
    assert "one character; got '||'" in refused(path, "x\n1\n", "||")
    with pytest.raises(TableError, match="No such file"):
        read_table(tmp_path / "none.tsv")
    with pytest.raises(TableError, match="Is a directory"):
        read_table(tmp_path)


def test_file_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes("filename\nä.wav\n".encode("latin-1"))
    table = read_table(path)
    assert table.column("filename") == ["\udce4.wav"]
    write_table(tmp_path / "b.tsv", table.columns)
    assert (tmp_path / "b.tsv").read_bytes() == path.read_bytes()


def test_written_tables_are_read_back(tmp_path: Path) -> None:
    columns = {"filename": ["a\tb.wav", 'say "x".wav', "ü.wav", "two\nlines"], "labels": ["", "1", "2;3", "4"]}
    path = tmp_path / "new" / "folder" / "a.tsv"
    write_table(path, columns)
    assert read_table(path).columns == columns
    assert path.read_bytes().startswith(b"filename\tlabels\n")
    write_table(path, {"x": ["1"]})
    assert path.read_text() == "x\n1\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    write_table(path, {"x": ["1"]})
    with pytest.raises(ValueError, match="argument"):
        write_table(path, {"x": ["2", "3"], "y": ["4"]})
    assert path.read_text() == "x\n1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_labels_are_parsed() -> None:
    fields = ["0", "2;1", "", " 3 ; 0 ", "2;1"]
    assert parse_labels(fields, 4, Path("a.tsv")) == [(0,), (2, 1), (), (3, 0), (2, 1)]


@pytest.mark.parametrize("label", ["4", "-1", "dog", "1.0", "1,2", "1;", "0;²", "9" * 5000])
def test_labels_out_of_range(label: str) -> None:
    with pytest.raises(TableError, match=r"^table a\.tsv, row 3: label '.*' is not one of 0 to 3$"):
        parse_labels(["0", "0;3", label, "9"], 4, Path("a.tsv"))


def test_a_missing_column_of_labels() -> None:
    with pytest.raises(TableError, match=r"^table a\.tsv has no column 'labels'; its columns are filename$"):
        Table({"filename": ["a"]}, Path("a.tsv")).column("labels")


SEGMENTS = """\
# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=7, num_segs=7, num_unique_labels=4, num_positive_labels=9
# YTID, start_seconds, end_seconds, positive_labels
--aaaaaaaaa, 30.000, 40.000, "/m/cat,/m/dog"
Y_bbbbbbbbb, 0.000, 10.000, "/t/rain"
cccc_cccc_c, 0.000, 9.500, "/m/dog,/m/0unknown"
ddddddddddd, 20.000, 30.000, "/m/dog"
eeeeeeeeeee, 20.000, 30.000, "/m/dog,/m/dog"
fffffffffff, 20.000, 30.000, "/m/0other"
ggggggggggg, 20.000, 30.000, "/m/dog"
"""


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_segments_of_a_folder(tmp_path: Path) -> None:
    audio, listed = tmp_path / "audio", tmp_path / "eval.csv"
    listed.write_text(SEGMENTS)
    touch(audio, "--aaaaaaaaa.wav", "YY_bbbbbbbbb.flac", "deep/cccc_cccc_c_0.000_9.500.WAV", "Yddddddddddd_20.ogg")
    touch(audio, "fffffffffff.wav", "xxxxxxxxxxx.wav", "eeeeeeeeeee.txt", "notes_eeeeeeeeeee.wav")
    report = segments_to_labels(listed, audio, CLASSES, tmp_path / "out" / "eval.tsv")
    table = read_table(tmp_path / "out" / "eval.tsv")
    assert table.columns == {
        "filename": [
            f"{audio}/--aaaaaaaaa.wav",
            f"{audio}/YY_bbbbbbbbb.flac",
            f"{audio}/Yddddddddddd_20.ogg",
            f"{audio}/deep/cccc_cccc_c_0.000_9.500.WAV",
        ],
        "labels": ["0;1", "2", "0", "0"],
    }
    assert report == LabelsReport(
        table=tmp_path / "out" / "eval.tsv",
        rows=4,
        missing=("eeeeeeeeeee", "ggggggggggg"),
        unlisted=(f"{audio}/notes_eeeeeeeeeee.wav", f"{audio}/xxxxxxxxxxx.wav"),
        unlabelled=(f"{audio}/fffffffffff.wav",),
        unknown_mids=("/m/0other", "/m/0unknown"),
    )
    assert parse_labels(table.column("labels"), 3, table.path) == [(0, 1), (2,), (0,), (0,)]


def test_segments_of_a_pack(tmp_path: Path) -> None:
    listed, pack = tmp_path / "eval.csv", tmp_path / "pack.tsv"
    listed.write_text(SEGMENTS)
    write_table(
        pack,
        {
            "filename": ["wavs/ddddddddddd.wav", "wavs/other.wav", "wavs/Yggggggggggg.wav"],
            "duration": ["1.0000", "2.0000", "3.0000"],
            "hdf5path": ["hdf5/p_0.h5", "hdf5/p_0.h5", "hdf5/p_1.h5"],
        },
    )
    report = segments_to_labels(listed, pack, CLASSES, tmp_path / "eval.tsv")
    assert (tmp_path / "eval.tsv").read_text() == (
        "filename\tlabels\thdf5path\nwavs/ddddddddddd.wav\t0\thdf5/p_0.h5\nwavs/Yggggggggggg.wav\t0\thdf5/p_1.h5\n"
    )
    assert report.unlisted == ("wavs/other.wav",)


def test_segments_that_are_refused(tmp_path: Path) -> None:
    audio, listed, out = tmp_path / "audio", tmp_path / "eval.csv", tmp_path / "eval.tsv"

    def refused(text: str, classes: ClassTable = CLASSES) -> str:
        listed.write_text(text)
        with pytest.raises(TableError) as caught:
            segments_to_labels(listed, audio, classes, out)
        assert not out.exists()
        return str(caught.value)

    audio.mkdir()
    assert "has no sound files" in refused(SEGMENTS)
    touch(audio, "unrelated.wav")
    assert "none of 1 files" in refused(SEGMENTS)
    touch(audio, "ddddddddddd.wav", "sub/Yddddddddddd_20.wav")
    assert refused(SEGMENTS) == (
        f"two files belong to segment ddddddddddd: {audio}/ddddddddddd.wav and {audio}/sub/Yddddddddddd_20.wav"
    )
    assert "line 2: 2 fields; expected YTID" in refused('# x\naaaaaaaaaaa, "/m/dog"\n')
    assert "line 2: segment aaaaaaaaaaa occurs twice" in refused('aaaaaaaaaaa, 0, 1, "/m/dog"\n' * 2)
    assert "has no segments" in refused("# nothing\n")
    assert "no mids" in refused(SEGMENTS, numbered(3))


def test_multi_hot_marks_the_labels() -> None:
    assert multi_hot([(0, 2), (), (1,)], 3).tolist() == [[True, False, True], [False] * 3, [False, True, False]]


NAMED = ClassTable(("dog", "cat", "rain"))


def labelled_table(folder: Path, text: str, files: tuple[str, ...] = ()) -> Path:
    """Write a table and empty files beside it."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    path = folder / "meta.tsv"
    path.write_text(text, encoding="utf-8")
    return path


def test_clips_with_several_labels(tmp_path: Path) -> None:
    path = labelled_table(
        tmp_path, "filename\tlabels\na.wav\t0;2\nb.wav\t\nsub/c.wav\t1\n", ("a.wav", "b.wav", "sub/c.wav")
    )
    assert read_labelled(path, NAMED) == [
        LabelledClip(tmp_path / "a.wav", (0, 2)),
        LabelledClip(tmp_path / "b.wav", ()),
        LabelledClip(tmp_path / "sub" / "c.wav", (1,)),
    ]


def test_a_folder_with_one_label_for_each_clip(tmp_path: Path) -> None:
    labelled_table(tmp_path, "filename\tfold\tlabel\tname\na.ogg\t1\t2\train\n", ("audio/a.ogg",))
    assert read_labelled(tmp_path, NAMED) == [LabelledClip(tmp_path / "audio" / "a.ogg", (2,))]


def test_folders_in_which_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.wav").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    absolute = tmp_path / "d.wav"
    absolute.touch()
    home = tmp_path / "home"
    path = labelled_table(
        home,
        f"filename\tlabels\na.wav\t0\nb.wav\t0\nc.wav\t0\n{absolute}\t0\n",
        ("a.wav", "audio/a.wav", "audio/b.wav"),
    )
    found = [clip.path for clip in read_labelled(path, NAMED)]
    assert found == [home / "a.wav", home / "audio" / "b.wav", Path("c.wav"), absolute]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename\tlabels\na.wav\t0\nb.wav\t1;3\n", "row 2: label '3' is not one of 0 to 2"),
        ("filename\tlabel\na.wav\tdog\n", "row 1: label 'dog' is not one of 0 to 2"),
        ("filename\tname\na.wav\tdog\n", "has no column 'labels'; its columns are filename, name"),
        ("file\tlabels\na.wav\t0\n", "has no column 'filename'"),
        (
            "filename\tlabels\na.wav\t0\ny.wav\t0\nz.wav\t1\n",
            "2 of 3 files do not exist, the first is 'y.wav'; they are looked for in ",
        ),
    ],
)
def test_labelled_tables_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = labelled_table(tmp_path, text, ("a.wav", "b.wav"))
    with pytest.raises(TableError) as caught:
        read_labelled(path, NAMED)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_labelled_table(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"cannot read table .*meta\.tsv"):
        read_labelled(tmp_path, NAMED)


@pytest.mark.skipif("CED_ESC10" not in os.environ, reason="CED_ESC10 names no copy of ESC-10")
def test_the_table_of_esc10() -> None:
    clips = read_labelled(os.environ["CED_ESC10"], numbered(10))
    assert len(clips) == 400
    assert [sum(clip.labels == (label,) for clip in clips) for label in range(10)] == [40] * 10


def test_labels_of_another_class_table_are_refused(tmp_path: Path) -> None:
    path = labelled_table(tmp_path, "filename\tlabel\tname\na.wav\t1\tCat\nb.wav\t0\tSpeech\n", ("a.wav", "b.wav"))
    with pytest.raises(TableError, match=r"row 2: label 0 has the name 'Speech', but 'dog' in the model"):
        read_labelled(path, NAMED)
