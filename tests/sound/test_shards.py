"""Members of tar and Parquet files as sounds, complete and damaged."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ced.errors import AudioError
from ced.remote import Listed
from ced.sound import shards
from ced.sound.audio import load, open_sound
from tests.stores import CLIPS, audio_table, parquet_of, tar_of

NAMES = list(CLIPS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_members_are_read_in_any_order_as_the_files_they_hold(folder: Path, kind: str) -> None:
    path = folder / f"a.{kind}"
    path.write_bytes(tar_of(CLIPS) if kind == "tar" else parquet_of(audio_table(CLIPS)))
    assert shards.members(str(path)) == (tuple(NAMES), None)
    for name in [*NAMES, *reversed(NAMES)]:
        assert np.array_equal(load(f"a.{kind}!{name}"), load(CLIPS[name]))
    with pytest.raises(AudioError, match="no member"):
        load(f"a.{kind}!none.flac")
    with pytest.raises(AudioError, match="No such file"):
        load(f"b.{kind}!none.flac")


def test_many_rows_are_read_in_bounded_memory(folder: Path) -> None:
    rows = {f"{number}.flac": bytes([number % 256]) * 10_000 for number in range(300)}
    (folder / "a.parquet").write_bytes(parquet_of(audio_table(rows), rows=200))
    found = shards._rows_of("a.parquet", None, "audio.bytes")
    for number in [*range(300), 10, 299, 150]:
        assert found.read(number) == rows[f"{number}.flac"]
        assert len(found._held) <= 64


def test_few_parquet_files_are_held_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = shards._open_parquet

    def opening(shard: str) -> Any:
        opened.append(shard)
        return real(shard)

    monkeypatch.setattr(shards, "_open_parquet", opening)
    shards._rows_of.cache_clear()
    names = [f"{number}.parquet" for number in range(shards._READERS + 2)]
    for name in names:
        Path(name).write_bytes(parquet_of(audio_table(CLIPS)))
        for member in (*NAMES, *NAMES):
            load(f"{name}!{member}")
    assert opened == [name for name in names for _ in range(2)]  # once for the names, once for the rows
    assert shards._rows_of.cache_info().currsize == shards._READERS


def test_a_file_is_not_taken_for_a_member(folder: Path) -> None:
    name = "odd.tar!a.flac"
    assert shards.split_member(name) == ("odd.tar", "a.flac")
    (folder / name).write_bytes(CLIPS[NAMES[0]])
    assert shards.split_member(name) is None
    assert np.array_equal(load(name), load(CLIPS[NAMES[0]]))


def test_a_changed_shard_is_searched_again(folder: Path) -> None:
    Path("a.tar").write_bytes(tar_of({"a.flac": CLIPS[NAMES[0]]}))
    assert shards.members("a.tar")[0] == ("a.flac",)
    Path("a.tar").write_bytes(tar_of({"b.flac": CLIPS[NAMES[0]], "a.flac": CLIPS[NAMES[1]]}))
    assert shards.members("a.tar")[0] == ("b.flac", "a.flac")
    assert shards.members(Listed("a.tar", (1, 2)))[0] == ("b.flac", "a.flac")


def test_a_member_that_the_end_of_the_archive_cuts_is_incomplete(folder: Path) -> None:
    data = tar_of(CLIPS)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        last = archive.getmembers()[-1]
    Path("cut.tar").write_bytes(data[: last.offset_data + last.size // 2])
    names, fault = shards.members("cut.tar")
    assert list(names) == NAMES
    assert fault is not None
    assert NAMES[-1] in fault
    assert len(load(f"cut.tar!{NAMES[0]}")) == len(load(CLIPS[NAMES[0]]))
    with open_sound(f"cut.tar!{NAMES[-1]}") as sound:
        samples = sum(map(len, sound.blocks()))
        assert not sound.complete
    assert 0 < samples < len(load(CLIPS[NAMES[-1]]))
    with pytest.raises(AudioError, match="cut short"):
        load(f"cut.tar!{NAMES[-1]}")


@pytest.mark.parametrize("damage", [b"x" * 512, bytes(512)])
def test_a_damaged_header_costs_only_its_member_and_is_reported(folder: Path, damage: bytes) -> None:
    data = bytearray(tar_of(CLIPS))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        second = archive.getmembers()[1].offset
    data[second : second + 512] = damage
    Path("a.tar").write_bytes(data)
    names, fault = shards.members("a.tar")
    assert list(names) == [NAMES[0], NAMES[2]]
    assert f"damaged after the member {NAMES[0]}" in (fault or "")
    assert np.array_equal(load(f"a.tar!{NAMES[2]}"), load(CLIPS[NAMES[2]]))
    with pytest.raises(AudioError, match="damaged"):
        load(f"a.tar!{NAMES[1]}")


def test_joined_archives_have_the_members_of_all(folder: Path) -> None:
    one, other = tar_of({"1.flac": CLIPS[NAMES[0]]}), tar_of({"2.flac": CLIPS[NAMES[1]]})
    Path("a.tar").write_bytes(tar_of({}) + one + other)
    assert shards.members("a.tar") == (("1.flac", "2.flac"), None)
    assert np.array_equal(load("a.tar!2.flac"), load(CLIPS[NAMES[1]]))


def test_links_and_repeated_names_in_an_archive(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open("a.tar", "w") as archive:
        for data in (CLIPS[NAMES[0]], CLIPS[NAMES[1]]):
            member = tarfile.TarInfo("1.flac")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, kind in (("hard.flac", tarfile.LNKTYPE), ("soft.flac", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "1.flac"
            archive.addfile(member)
    assert shards.members("a.tar") == (("1.flac", "hard.flac", "soft.flac"), None)
    assert "a.tar: 1 members are replaced by later ones" in caplog.text
    for name in ("1.flac", "hard.flac"):
        assert np.array_equal(load(f"a.tar!{name}"), load(CLIPS[NAMES[1]]))
    with pytest.raises(AudioError, match=r"a\.tar!soft\.flac: a link"):
        load("a.tar!soft.flac")


def test_archives_without_members(folder: Path) -> None:
    Path("empty.tar").write_bytes(tar_of({}))
    assert shards.members("empty.tar") == ((), None)
    with pytest.raises(AudioError, match="no sounds"):
        load("empty.tar!")
    Path("nothing.tar").write_bytes(b"")
    with pytest.raises(AudioError, match="not a tar archive"):
        shards.members("nothing.tar")


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.tar.gz", "a.tgz"])
def test_what_is_no_shard_is_refused(folder: Path, name: str) -> None:
    Path(name).write_bytes(b"\x1f\x8b some other data " * 100)
    with pytest.raises(AudioError, match=r"not a|compressed"):
        shards.members(name)


def test_damaged_rows_are_errors_and_other_groups_are_read(folder: Path) -> None:
    data = bytearray(parquet_of(audio_table(CLIPS), rows=1))
    start = data.index(CLIPS[NAMES[0]])
    header = data.rindex(b"PAR1", 0, start) + 4
    data[header : start - 4] = b"\xff" * (start - 4 - header)
    Path("a.parquet").write_bytes(data)
    with pytest.raises(AudioError, match=r"a\.parquet!.*damaged"):
        load(f"a.parquet!{NAMES[0]}")
    assert np.array_equal(load(f"a.parquet!{NAMES[1]}"), load(CLIPS[NAMES[1]]))


def test_columns_of_parquet(folder: Path) -> None:
    sounds = list(CLIPS.values())
    tables = {
        "bytes": pa.table({"filename": NAMES, "sound": sounds}),
        "numbers": pa.table({"audio": sounds, "picture": sounds, "path": ["a.flac"] * len(NAMES)}),
        "paths": audio_table({"a.flac": None, "b.flac": sounds[0]}),
        "two": pa.table({"one": sounds, "other": sounds}),
        "none": pa.table({"text": NAMES}),
        "floats": pa.table({"audio": [[0.5, -0.5]]}),
    }
    for name, table in tables.items():
        Path(f"{name}.parquet").write_bytes(parquet_of(table))
    assert shards.members("bytes.parquet")[0] == tuple(NAMES)
    assert shards.members("numbers.parquet")[0] == ("0", "1", "2")  # names occur twice
    assert np.array_equal(load("numbers.parquet!1"), load(sounds[1]))
    with pytest.raises(AudioError, match="no bytes"):
        load("paths.parquet!a.flac")
    expected = {"two": "several columns", "none": r"no column .* text \(string\)", "floats": r"audio \(list<.*double"}
    for name, words in expected.items():
        with pytest.raises(AudioError, match=words):
            shards.members(f"{name}.parquet")
