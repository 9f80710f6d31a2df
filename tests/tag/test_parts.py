"""Folders of Parquet parts: each file's rows are in one part, whatever was killed, changed or written twice."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from ced.errors import ConfigError, StoreError
from ced.tag.inputs import InputSound
from ced.tag.journal import stamp_of
from ced.tag.parts import FileResult, Part, PartFolder, plan, to_do
from tests.stores import memory

__all__ = ["memory"]  # fixture

SCHEMA = pa.schema([("file", pa.string()), ("prob", pa.float32())])


@pytest.fixture
def folder(tmp_path: Path) -> PartFolder:
    folder = PartFolder(tmp_path / "out", "tags")
    folder.begin({"model": "a"})
    return folder


def given(tmp_path: Path, *names: str) -> list[InputSound]:
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    return [InputSound(name, str(tmp_path / name), name) for name in names]


def write_part(
    folder: PartFolder, name: str, items: Sequence[InputSound], prob: float, failed: Sequence[str] = ()
) -> None:
    """Write a part with two rows for each file, none for those that failed."""
    names = [item.name for item in items if item.name not in failed]
    table = pa.table({"file": [name for name in names for _ in range(2)], "prob": [prob] * 2 * len(names)}, SCHEMA)
    errors = ["damaged" if item.name in failed else None for item in items]
    results = [
        FileResult(item.name, 1.5, error is None, error, stamp_of(item))
        for item, error in zip(items, errors, strict=True)
    ]
    folder.write(name, SCHEMA, [table], results)


def write(folder: PartFolder, name: str, items: Sequence[InputSound], prob: float, failed: Sequence[str] = ()) -> None:
    """Write a part of a local folder, newer than those there."""
    write_part(folder, name, items, prob, failed)
    path = folder.out / "tags" / f"{name}.parquet"
    parts = len(list(path.parent.iterdir()))
    os.utime(path, ns=(parts, parts))  # written one after the other, however coarse the clock


def rows(folder: PartFolder) -> list[tuple[str, float]]:
    table = parquet.read_table(folder.out / "tags")
    return sorted(zip(table["file"].to_pylist(), table["prob"].to_pylist(), strict=True))


def test_a_file_in_two_parts_keeps_the_rows_of_the_newest(folder: PartFolder, tmp_path: Path) -> None:
    items = given(tmp_path, "a", "b", "c")
    write(folder, "x", items[:2], 0.25)
    write(folder, "y", items[1:], 0.5)
    found = folder.settle()
    assert rows(folder) == [("a", 0.25)] * 2 + [("b", 0.5)] * 2 + [("c", 0.5)] * 2
    assert {name: result.seconds for name, result in found.items()} == {"a": 1.5, "b": 1.5, "c": 1.5}
    assert [each.file for each in folder.results()["x"]] == ["a"]
    assert folder.settle() == found


def test_a_part_that_two_machines_write_is_that_of_the_last(folder: PartFolder, tmp_path: Path) -> None:
    items = given(tmp_path, "a", "b")
    write(folder, "x", items, 0.25)
    write(folder, "x", items, 0.5, failed=["b"])
    assert rows(folder) == [("a", 0.5)] * 2
    assert {name: result.error for name, result in folder.settle().items()} == {"a": None, "b": "damaged"}
    assert folder.result_of("x") == folder.results()["x"]
    assert folder.result_of("y") is None


def test_files_that_failed_or_changed_are_done_again(folder: PartFolder, tmp_path: Path) -> None:
    items = given(tmp_path, "a", "b", "c", "d")
    write(folder, "x", items[:3], 0.25, failed=["b"])
    (tmp_path / "c").write_bytes(b"longer")
    todo = to_do(items, folder.settle())
    assert [item.name for item in todo] == ["b", "c", "d"]
    folder.settle([item.name for item in todo])
    assert rows(folder) == [("a", 0.25)] * 2
    write(folder, "y", todo, 0.5)
    found = folder.settle()
    assert rows(folder) == [("a", 0.25)] * 2 + [("b", 0.5)] * 2 + [("c", 0.5)] * 2 + [("d", 0.5)] * 2
    assert to_do(items, found) == []


def test_failures_are_listed(folder: PartFolder, tmp_path: Path) -> None:
    items = given(tmp_path, "a", "b")
    write(folder, "x", items, 0.25, failed=["b"])
    folder.finish(folder.settle().values())
    assert json.loads((folder.out / "errors.jsonl").read_text()) == {"file": "b", "error": "damaged"}
    size, modified = stamp_of(items[0]) or (0, 0)
    files = parquet.read_table(folder.out / "files.parquet").to_pylist()
    expected = {"file": "a", "seconds": 1.5, "complete": True, "error": None, "size": size, "modified": modified}
    assert files[0] == expected
    assert (files[1]["file"], files[1]["complete"], files[1]["error"]) == ("b", False, "damaged")
    write(folder, "y", items[1:], 0.5)
    folder.finish(folder.settle().values())
    assert not (folder.out / "errors.jsonl").exists()


def test_parts_hold_few_files_and_few_bytes(tmp_path: Path) -> None:
    items = given(tmp_path, *map(str, range(100)))
    parts = list(plan(items, workers=2))
    assert [item for part in parts for item in part.inputs] == items
    assert [len(part.inputs) for part in parts] == [4] * 25
    assert len({part.name for part in parts}) == len(parts)
    assert [part.name for part in plan(items, workers=2)] == [part.name for part in parts]
    assert max(len(part.inputs) for part in plan(given(tmp_path, *map(str, range(600))), workers=1)) == 38
    with (tmp_path / "0").open("wb") as large:
        large.truncate(1 << 28)
    assert [len(part.inputs) for part in plan(items[:4], workers=1)] == [1, 1, 1, 1]
    assert next(plan(items, workers=2)).inputs == tuple(items[:1])


def test_a_part_is_named_by_its_files_and_their_stamps(tmp_path: Path) -> None:
    (item,) = given(tmp_path, "a")
    names = {Part((item,), (stamp,)).name for stamp in (None, (1, 2), (1, 3))}
    assert len(names) == 3


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one name"):
        list(plan(given(tmp_path, "a", "a"), workers=1))


def test_other_settings_are_refused(folder: PartFolder) -> None:
    assert folder.begin({"model": "a"}) == folder.begin({"model": "a"})
    with pytest.raises(ConfigError, match='model "a", now "b"'):
        folder.begin({"model": "b"})
    with pytest.raises(ConfigError, match='rows "tags", now "vectors"'):
        PartFolder(folder.out, "vectors").begin({"model": "a"})


def test_a_run_of_one_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(ConfigError, match="one machine"):
        PartFolder(tmp_path, "tags").begin({})


def test_a_machine_that_sees_another_folder_writes_nothing(folder: PartFolder, tmp_path: Path) -> None:
    begun = folder.begin({"model": "a"})
    folder.check(begun, "here")
    for other in (tmp_path / "missing", tmp_path / "other"):
        with pytest.raises(ConfigError, match=r"machine there does not see the folder .*; name one"):
            PartFolder(other, "tags").check(begun, "there")
        assert not other.exists()


@pytest.mark.parametrize("content", [b"", b"PAR1 no table PAR1", b"[]"])
def test_damaged_parts_are_errors(folder: PartFolder, content: bytes) -> None:
    path = folder.out / "tags" / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"x\.parquet is damaged"):
        folder.settle()
    for metadata in (None, {"ced.files": "[1]"}, {"ced.files": '[["a", 1.5, true, null, [1]]]'}):
        parquet.write_table(pa.table({"file": ["a"]}).replace_schema_metadata(metadata), path)
        with pytest.raises(StoreError, match=r"x\.parquet is damaged"):
            folder.settle()
    (folder.out / "run.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"run\.json is damaged"):
        folder.begin({"model": "a"})


def test_parts_in_a_store(memory: Any, tmp_path: Path) -> None:
    folder = PartFolder(Path("memory://out/run"), "tags")
    begun = folder.begin({"model": "a"})
    assert folder.results() == {}
    assert folder.begin({"model": "a"}) == begun
    items = given(tmp_path, "a", "b", "c")
    write_part(folder, "x", items[:2], 0.25)
    time.sleep(0.01)  # the next part is newer
    write_part(folder, "y", items[1:], 0.5, failed=["c"])
    found = folder.settle()
    assert {name: (result.error, result.stamp) for name, result in found.items()} == {
        "a": (None, stamp_of(items[0])), "b": (None, stamp_of(items[1])), "c": ("damaged", stamp_of(items[2])),
    }  # fmt: skip
    assert list(memory.find("/out/run")) == [
        "/out/run/run.json", "/out/run/tags/x.parquet", "/out/run/tags/y.parquet",
    ]  # fmt: skip
    table = parquet.read_table("/out/run/tags", filesystem=memory)
    assert sorted(zip(table["file"].to_pylist(), table["prob"].to_pylist(), strict=True)) == (
        [("a", 0.25)] * 2 + [("b", 0.5)] * 2
    )
    folder.finish(found.values())
    assert b'"c"' in memory.cat("/out/run/errors.jsonl")
    folder.settle(again=["a", "b", "c"])
    assert folder.results() == {}
    folder.finish([])
    assert not memory.exists("/out/run/errors.jsonl")
    folder.check(begun, "here")
    with pytest.raises(ConfigError, match="machine there does not see"):
        folder.check("other", "there")
    with pytest.raises(ConfigError, match='model "a", now "b"'):
        folder.begin({"model": "b"})
    memory.rm_file("/out/run/run.json")
    with pytest.raises(ConfigError, match=r"machine there cannot read .*no such file"):
        folder.check(begun, "there")
    memory.pipe("/out/run/run.json", b"{")
    with pytest.raises(StoreError, match=r"memory:/.*run\.json is damaged"):
        folder.begin({"model": "a"})
    memory.pipe("/out/run/tags/z.parquet", b"PAR1 no table PAR1")
    with pytest.raises(StoreError, match=r"z\.parquet is damaged"):
        folder.settle()


def test_an_interrupted_part_does_not_appear_in_a_store(memory: Any, tmp_path: Path) -> None:
    folder = PartFolder(Path("memory://out/run"), "tags")
    folder.begin({"model": "a"})

    def tables() -> Iterator[pa.Table]:
        yield pa.table({"file": ["a"], "prob": [0.5]}, SCHEMA)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write("x", SCHEMA, tables(), [])
    assert memory.find("/out/run") == ["/out/run/run.json"]
