import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ced.errors import AudioError, ConfigError
from ced.sound.audio import load
from ced.sound.web import TrustedAddress
from ced.tag.inputs import InputSound, find_inputs
from ced.tag.journal import stamp_of
from tests.stores import CLIPS, audio_table, memory, parquet_of, tar_of

__all__ = ["memory"]  # fixture


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sounds, and of things that are none, as the working directory."""
    names = ["in/b.wav", "in/a.FLAC", "in/a/z.mp3", "in/a.b/y.m4a", "in/notes.txt", "in/.hidden.wav", "in/.git/x.wav"]
    for name in [*names, "in/._a.FLAC", "other/b.wav", "none/notes.txt", "odd [1].wav"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*words: str, stdin: bytes | None = None) -> list[tuple[str, str]]:
    inputs = find_inputs(words, None if stdin is None else io.BytesIO(stdin))
    return [(item.name, item.relative.as_posix()) for item in inputs]


def test_files_as_they_are_named(tree: Path) -> None:
    assert find_inputs(["in/notes.txt"]) == [InputSound("in/notes.txt", "in/notes.txt", "notes.txt")]
    assert found("in/b.wav", "in/a.FLAC") == [("in/b.wav", "b.wav"), ("in/a.FLAC", "a.FLAC")]
    assert found("in/b.wav", "./other/b.wav") == [("in/b.wav", "in/b.wav"), ("./other/b.wav", "other/b.wav")]
    assert found(f"{tree}/in/b.wav", "odd [1].wav") == [
        (f"{tree}/in/b.wav", "in/b.wav"),
        ("odd [1].wav", "odd [1].wav"),
    ]
    assert found("missing.wav") == [("missing.wav", "missing.wav")]
    assert found("../x/in/b.wav", "in/b.wav", "in/b.wav") == [
        ("../x/in/b.wav", "x/in/b.wav"),
        ("in/b.wav", f"{tree.name}/in/b.wav"),
    ]


def test_text_and_images_named_beside_sounds_are_skipped(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    words = ["in/b.wav", "in/README.md", "in/cover.jpg", "in/gone.wav", "in/unknown.xyz"]
    assert [name for name, _ in found(*words)] == ["in/b.wav", "in/gone.wav", "in/unknown.xyz"]
    assert caplog.messages == ["skipped: 1 .jpg, 1 .md"]
    assert [name for name, _ in found("in/notes.txt", "in/README.md")] == ["in/notes.txt", "in/README.md"]


def test_folders_are_searched_recursively(tree: Path) -> None:
    inside = [("a/z.mp3"), ("a.FLAC"), ("a.b/y.m4a"), ("b.wav")]
    assert found("in") == [(f"in/{name}", name) for name in inside]
    assert found("in/")[0] == ("in/a/z.mp3", "a/z.mp3")
    assert found(str(tree / "in")) == [(f"{tree}/in/{name}", name) for name in inside]
    assert found("in/a", "in/a/z.mp3") == [("in/a/z.mp3", "z.mp3")]
    with pytest.raises(
        AudioError, match=r"^folder none contains no sound files: 1 \.txt; known suffixes: .*\.flac, .*\.m4a, "
    ):
        find_inputs(["in", "none"])


def test_skipped_files_of_a_folder_are_counted(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a.txt", "b.TXT", "c.jpg", "d", "deep/e.txt", "f.png", "g.gif", "h.bmp", "i.pdf", ".j", "sound.wav"]
    for name in names:
        path = tree / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    caplog.set_level("INFO")
    assert found("mixed") == [("mixed/sound.wav", "sound.wav")]
    (note,) = caplog.messages
    assert note.startswith("mixed: skipped: 3 .txt, ")
    assert note.endswith(" 3 others")
    caplog.clear()
    assert found("other") == [("other/b.wav", "b.wav")]
    assert caplog.messages == []


KINDS = "ts mxf vob mts m2ts m4v eac3 dts spx gsm voc ogv awb tak mpc bwf BWF"


@pytest.mark.parametrize("suffix", KINDS.split())
def test_suffixes_of_recorders_and_films_are_known(tree: Path, suffix: str) -> None:
    (tree / f"none/a.{suffix}").write_bytes(b"\x47@\0\x10" + bytes(184))
    assert found("none") == [(f"none/a.{suffix}", f"a.{suffix}")]


@pytest.mark.parametrize("suffix", ["ts", "mts"])
def test_typescript_sources_are_not_films(tree: Path, caplog: pytest.LogCaptureFixture, suffix: str) -> None:
    (tree / f"none/a.{suffix}").write_text('import { Graph } from "./graph";\n')
    (tree / f"none/b.{suffix}").write_bytes(bytes(4) + b"\x47@\0\x10" + bytes(184))  # packets with a time stamp
    caplog.set_level("INFO")
    assert found("none") == [(f"none/b.{suffix}", f"b.{suffix}")]
    assert f"1 .{suffix}" in caplog.messages[0]


@pytest.mark.skipif(os.name == "nt", reason="pipes and links as POSIX has them")
def test_only_files_are_taken_from_a_folder(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tree / "other/pipe.wav")
    (tree / "other/zero.wav").symlink_to("/dev/zero")
    (tree / "other/folder").symlink_to(tree / "in")
    (tree / "other/link.wav").symlink_to(tree / "in/b.wav")
    (tree / "other/broken.wav").symlink_to(tree / "nowhere.wav")
    (tree / "other/named.wav").mkdir()
    caplog.set_level("INFO")
    assert [name for name, _ in found("other")] == ["other/b.wav", "other/broken.wav", "other/link.wav"]
    assert caplog.messages == ["other: skipped: 2 pipe or device, 1 linked folder"]


def test_a_folder_that_cannot_be_searched_is_reported(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("a.b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert ("in/a/z.mp3", "a/z.mp3") in found("in")
    assert "folder in/a.b cannot be searched: Permission denied" in caplog.text


def test_patterns(tree: Path) -> None:
    assert found("*/b.wav") == [("in/b.wav", "in/b.wav"), ("other/b.wav", "other/b.wav")]
    assert found("in/*.[wF]*") == [("in/a.FLAC", "a.FLAC"), ("in/b.wav", "b.wav")]
    assert found("in/**/*.m??") == [("in/a.b/y.m4a", "a.b/y.m4a"), ("in/a/z.mp3", "a/z.mp3")]
    (tree / "in/a/deep").mkdir()
    assert found("in/*/*/../../../other/b.wav") == [("in/a/deep/../../../other/b.wav", "other/b.wav")]  # never "../"
    with pytest.raises(AudioError, match=r"^no file matches in/\*\.aiff$"):
        find_inputs(["in/b.wav", "in/*.aiff"])


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\0"])
def test_a_list(tree: Path, ends: str) -> None:
    text = ends.join(["in/b.wav", "", "odd [1].wav", "http://a.b/c.mp3", "other", "in/*.wav", ""]).encode()
    expected = [
        ("in/b.wav", "in/b.wav"),
        ("odd [1].wav", "odd [1].wav"),
        ("http://a.b/c.mp3", "a.b/c.mp3"),
        ("other/b.wav", "b.wav"),
        ("in/*.wav", "in/*.wav"),
    ]
    (tree / "list").write_bytes(text)
    assert found("@list") == expected
    assert found("@-", stdin=text) == expected
    with pytest.raises(AudioError, match="the list standard input is empty"):
        found("@-", stdin=b"\n \n")
    with pytest.raises(AudioError, match="cannot read the list nothing: No such file"):
        find_inputs(["@nothing"])


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-16-le"),
        (b"", "utf-16-be"),
        (b"\xef\xbb\xbf", "utf-8"),
        (b"\xff\xfe", "utf-16-le"),
        (b"\xfe\xff", "utf-16-be"),
    ],
)
@pytest.mark.parametrize("ends", ["\r\n", "\n"])
def test_lists_of_windows_programs_in_utf_16(tree: Path, mark: bytes, encoding: str, ends: str) -> None:
    (tree / "Käfer 虫.wav").touch()
    text = mark + ends.join(["in/b.wav", "Käfer 虫.wav", ""]).encode(encoding)
    (tree / "list").write_bytes(text)
    assert [name for name, _ in found("@list")] == ["in/b.wav", "Käfer 虫.wav"]
    assert [name for name, _ in found("@-", stdin=text)] == ["in/b.wav", "Käfer 虫.wav"]


def test_a_list_with_invalid_utf_16(tree: Path) -> None:
    (tree / "list").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AudioError, match="the list list: it begins like UTF-16 text"):
        found("@list")


def test_sound_on_standard_input(tree: Path) -> None:
    stdin = io.BytesIO(b"RIFF")
    assert find_inputs(["-"], stdin) == [InputSound("<stdin>", stdin, "stdin")]
    assert stdin.tell() == 0
    for words in (["-", "@-"], ["-", "-"]):
        with pytest.raises(ConfigError, match="standard input"):
            find_inputs(words, stdin)
    with pytest.raises(ConfigError, match="standard input"):
        find_inputs(["-"])


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("http://a.b/c/d.mp3", "a.b/c/d.mp3"),
        ("HTTPS://me:secret@a.b:80/d.mp3?id=1&x=/..", "a.b/d.mp3%3Fid=1%26x=%2F.."),
        ("https://a.b/../../etc/d", "a.b/etc/d"),
        ("http://a.b", "a.b/index"),
    ],
)
def test_addresses(address: str, place: str) -> None:
    name = address.replace("HTTPS://me:secret", "https://me:***")
    assert find_inputs([address]) == [InputSound(name, address, place)]
    (trusted,) = find_inputs([address], allow_private=True)
    assert isinstance(trusted.source, TrustedAddress)
    assert trusted == InputSound(name, address, place)


def test_no_arguments() -> None:
    with pytest.raises(ConfigError, match="nothing to tag"):
        find_inputs([])


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_names_that_are_not_valid_text(tree: Path) -> None:
    name = os.fsdecode(b"caf\xe9.wav")
    (tree / "none" / name).touch()
    assert found("none") == [(f"none/{name}", name)]
    assert found("none/*.wav") == [(f"none/{name}", name)]
    assert found("@-", stdin=b"none/caf\xe9.wav\n") == [(f"none/{name}", name)]


@pytest.mark.parametrize("place", ["memory://", ""])
def test_shards_in_files_and_stores(tree: Path, memory: Any, caplog: pytest.LogCaptureFixture, place: str) -> None:
    text = {"a/1.json": b"{}", "a/2.json": b"{}", "a/._1.flac": b"x"}
    files = {
        "s/1.tar": tar_of({**CLIPS, **text}),
        "s/2.tar": tar_of({"../../x.flac": b"x"}),
        "s/t.parquet": parquet_of(audio_table({"/x/1": b"1", "2": b"2"})),
        "s/broken.tar": b"broken" * 1000,
        "s/empty.tar": tar_of(text),
    }
    for name, data in files.items():
        path = tree / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        memory.pipe(f"/{name}", data)
    caplog.set_level(logging.INFO)
    expected = [(f"{place}s/1.tar!{name}", f"1.tar/{name}") for name in CLIPS]
    assert found(f"{place}s/1*.tar") == expected
    assert "3 sounds, skipped: 2 .json, 1 hidden" in caplog.text
    assert found(f"{place}s/[2b]*.tar", f"{place}s/*.parquet") == [
        (f"{place}s/2.tar!../../x.flac", "2.tar/x.flac"),
        (f"{place}s/broken.tar", "broken.tar"),
        (f"{place}s/t.parquet!/x/1", "t.parquet/x/1"),
        (f"{place}s/t.parquet!2", "t.parquet/2"),
    ]
    stamps = {stamp_of(item) for item in find_inputs([f"{place}s/1.tar", f"{place}s/1*.tar"])}
    assert len(stamps) == 1
    assert None not in stamps
    (empty,) = find_inputs([f"{place}s/empty.tar"])
    with pytest.raises(AudioError, match=r"s/empty\.tar: .*no sounds"):
        load(empty.source)
    (failing,) = find_inputs([f"{place}s/broken.tar"])
    with pytest.raises(AudioError, match=r"^(memory://)?s/broken\.tar: .*not a tar"):
        load(failing.source)


def test_folders_and_patterns_of_stores(tree: Path, memory: Any, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/b.wav", "a/a/z.mp3", "a/.hidden/x.wav", "a/notes.txt", "a/what#1?.flac", "none/notes.txt"):
        memory.pipe(f"/{name}", b"1")
    caplog.set_level(logging.INFO)
    expected = [("memory://a/a/z.mp3", "a/z.mp3"), ("memory://a/b.wav", "b.wav")]
    odd = ("memory://a/what#1?.flac", "what#1?.flac")
    assert found("memory://a") == found("memory://a/") == [*expected, odd]
    assert "skipped: 1 .txt, 1 hidden" in caplog.text
    assert found("memory://a/**/*.[wm]*") == expected
    (tree / "list").write_text("memory://a/b.wav\nmemory://gone/b.wav\nin/b.wav\n")
    assert found("@list") == [
        ("memory://a/b.wav", "a/b.wav"),
        ("memory://gone/b.wav", "gone/b.wav"),
        ("in/b.wav", "b.wav"),
    ]
    for words, message in {
        "memory://none": "no sound files in .*: 1 .txt",
        "memory://a/*.opus": "no file matches",
    }.items():
        with pytest.raises(AudioError, match=message):
            find_inputs([words])
    (missing,) = find_inputs(["memory://gone/"])  # reading it fails
    with pytest.raises(AudioError, match="no such file"):
        load(missing.source)
